"""Shuffled and locked experts on disk merge as the experts that they were."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import trainmerge as tm
from tests.align.twins import locks, logits, shuffles, under
from tests.world import WORDS, bert, languages_recipe, llama, nudge, write_texts, write_tokenizer, write_world
from trainmerge.align import families
from trainmerge.inspection import inspect_path
from trainmerge.run.config import read_config, write_config
from trainmerge.run.same_function import LARGEST
from trainmerge.task_vectors.delta import dense_term

EVERY = [tm.Neurons(), tm.ResidualStream(), tm.AttentionHeads(), tm.Gauge()]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and two experts `a` and `b`; `shuffled`, `locked`: experts with the function of `b`."""
    root = tmp_path_factory.mktemp("aligned")

    def made(seed: int | None) -> torch.nn.Module:
        model = llama(tied=True)
        nudge(model, 5, 0.3)
        if seed is not None:
            nudge(model, seed, 0.01)
        return model

    made(None).save_pretrained(root / "base")
    write_tokenizer(root / "base")
    for seed, name in enumerate("ab"):
        made(seed).save_pretrained(root / name)
        write_texts(root / name, "mood", seed)
        shutil.copy(root / name / "calibration.jsonl", root / f"{name}.jsonl")
        shutil.copy(root / name / "test.jsonl", root / f"{name}-test.jsonl")
    twin = made(1)
    for name, maps in {
        "shuffled": shuffles(twin, "stream heads neurons"),
        "locked": locks(twin, "query value", d=16),
    }.items():
        write(root, name, under(twin, maps))
    return root


def write(root: Path, name: str, state: Mapping[str, Tensor]) -> None:
    shutil.copytree(root / "b", root / name)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, root / name / "model.safetensors")


def with_twin(root: Path, twin: str, **changes: object) -> tm.Recipe:
    """The recipe of both experts, with a twin's files in place of those of `b`."""
    made = languages_recipe(root, **changes)
    return replace(made, experts={**made.experts, "b": replace(made.experts["b"], path=str(root / twin))})


def taus(recipe: tm.Recipe, place: Path) -> dict[str, Tensor]:
    """The task vectors of `b`."""
    deltas = recipe.open(place).task_vectors.deltas
    return {name: dense_term(delta.terms[1], delta.base) for name, delta in deltas.items()}


def test_a_shuffled_twin_has_the_task_vectors_of_the_expert(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = taus(languages_recipe(origin), tmp_path)
    found = taus(with_twin(origin, "shuffled", align=EVERY), tmp_path)
    for name, tau in expected.items():
        assert torch.equal(found[name], tau), name
    said = capsys.readouterr().out
    assert "a: in line with the base already: nothing was moved" in said
    assert "units of the residual stream moved" in said
    assert "8 calibration texts" in said
    assert len(list(tmp_path.glob("aligned-*"))) == 2


def test_a_locked_expert_has_nearly_the_task_vectors_of_the_expert(origin: Path, tmp_path: Path) -> None:
    expected = taus(languages_recipe(origin), tmp_path)
    locked = taus(with_twin(origin, "locked"), tmp_path)
    found = taus(with_twin(origin, "locked", align=EVERY), tmp_path)

    def error(own: dict[str, Tensor]) -> float:
        return sum(float((own[name] - tau).square().sum()) for name, tau in expected.items()) ** 0.5

    assert error(found) < 0.02 * error(locked)


def merged_logits(recipe: tm.Recipe, place: Path) -> Tensor:
    """The outputs of an exported average."""
    files = {name: str(expert.calibration) for name, expert in recipe.experts.items()}
    data = tm.Calibration(files, recipe.base)
    module = tm.MergeModule(recipe, initial=0.5, workspace=str(place / "run" / "workspace"))
    trainer = tm.make_trainer(place / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, place / "run")
    shutil.rmtree(place / "run" / "workspace", ignore_errors=True)  # made again
    tm.export_run(place / "run", place / "out")
    return logits(AutoModelForCausalLM.from_pretrained(place / "out"), len(WORDS))


def test_merges_of_twins_are_the_merge_of_the_experts(origin: Path, tmp_path: Path) -> None:
    merges = {
        "b": languages_recipe(origin),
        "plain": with_twin(origin, "locked"),
        "locked": with_twin(origin, "locked", align=EVERY),
        "shuffled": with_twin(origin, "shuffled", align=EVERY),
    }
    found = {}
    for name, recipe in merges.items():
        (tmp_path / name).mkdir()
        found[name] = merged_logits(recipe, tmp_path / name)
    assert torch.equal(found["shuffled"], found["b"])
    assert (found["locked"] - found["b"]).norm() < 0.05 * (found["plain"] - found["b"]).norm()


def test_inspect_says_that_an_expert_is_permuted_or_locked(origin: Path, tmp_path: Path) -> None:
    file, suggested = tmp_path / "recipe.yaml", tmp_path / "suggested.yaml"
    write_config(with_twin(origin, "shuffled"), "recipe", file)
    found = [
        finding for finding in inspect_path(file, suggestion=suggested) if "looks permuted" in finding.what
    ]
    assert [one.what.partition(" ")[0] for one in found] == ["b"]
    assert "trainmerge.ResidualStream, trainmerge.AttentionHeads, trainmerge.Neurons" in found[0].remedy
    made = read_config(tm.Recipe, "recipe", suggested)
    assert made.align == (tm.ResidualStream(), tm.AttentionHeads(), tm.Neurons())
    suggested.unlink()
    write_config(with_twin(origin, "locked"), "recipe", file)
    found = [
        finding
        for finding in inspect_path(file, suggestion=suggested)
        if "trainmerge.Gauge" in finding.remedy
    ]
    assert len(found) == 1
    assert read_config(tm.Recipe, "recipe", suggested).align == (tm.Gauge(),)
    write_config(languages_recipe(origin), "recipe", file)
    assert not [finding for finding in inspect_path(file) if "align" in finding.remedy]


def test_another_function_is_refused(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that forgets the norms of queries, say: the texts tell."""
    wrong = replace(families.DECODER, inside={**families.DECODER.inside, "input_layernorm.weight": ()})
    monkeypatch.setitem(families.FAMILIES, "llama", wrong)
    with pytest.raises(ValueError, match=f"b: its outputs on 8 calibration texts .* more than {LARGEST:g}"):
        with_twin(origin, "shuffled", align=EVERY).open(tmp_path)
    assert len(list(tmp_path.glob("aligned-*"))) == 1  # that of `a`


def test_what_cannot_be_aligned_is_named(origin: Path, tmp_path: Path) -> None:
    twin = with_twin(origin, "shuffled", align=EVERY)
    with pytest.raises(ValueError, match="set a workspace folder"):
        twin.open()
    root = tmp_path / "bert"
    own = bert()
    nudge(own, 0, 0.3)
    own.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    classifier = BertForSequenceClassification(own.config)
    classifier.bert.load_state_dict(own.state_dict(), strict=False)
    nudge(classifier, 1, 0.01)
    maps = shuffles(classifier, "stream")
    classifier.save_pretrained(root / "expert")
    state = {key: t.contiguous() for key, t in under(classifier, maps).items()}
    save_file(state, root / "expert" / "model.safetensors", {"format": "pt"})
    recipe = tm.Recipe(
        str(root / "base"), {"e": tm.Expert(str(root / "expert"))}, align=[tm.ResidualStream()]
    )
    recipe.open(tmp_path)  # its classifier reads the pooler's output, which stays
    save_file({**state, "odd.weight": torch.ones(3)}, root / "expert" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"odd\.weight is not merged and reads the residual stream"):
        replace(recipe, ignore=["odd.weight"]).open(tmp_path)


def test_adapters_are_never_aligned(tmp_path: Path) -> None:
    recipe = write_world(tmp_path)
    only = replace(recipe, experts={"animal": recipe.experts["animal"]}, align=[tm.Neurons()])
    with pytest.raises(ValueError, match="every expert is an adapter"):
        only.open(tmp_path / "workspace")


def test_an_empty_list_is_the_default(origin: Path) -> None:
    assert languages_recipe(origin, align=[]) == languages_recipe(origin)
