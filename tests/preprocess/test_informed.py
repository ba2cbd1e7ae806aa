"""Methods that run the experts over calibration examples: their statistics against plain transformers models.

Legend: `B` examples, `T` tokens, `n` inputs of a linear layer.
"""

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertModel, LlamaForCausalLM

import trainmerge as tm
from tests.methods import SoftmaxLayer, random, vectors
from tests.world import (
    languages_recipe,
    llama,
    nudge,
    recipe,
    write_languages,
    write_tokenizer,
    write_world,
)
from trainmerge.checkpoints import load_model
from trainmerge.model import resident
from trainmerge.model.expert_statistics import ExpertStatistics
from trainmerge.model.loss_scale import LossScale, scaled_gradients
from trainmerge.preprocess import regmean
from trainmerge.preprocess.fisher import squares
from trainmerge.run.recipe_files import calibration_files
from trainmerge.task_vectors.delta import TaskVectors


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


def measure(merge: tm.Recipe, folder: Path) -> tuple[ExpertStatistics, TaskVectors]:
    module = tm.MergeModule(merge, workspace=str(folder / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    module.load(data)
    module.resident.merged.materialise()
    made = ExpertStatistics(module.resident, data.examples, data.tokenize, folder / "measured")
    return made, module.opened.task_vectors


def informed(method: tm.Preprocess, made: ExpertStatistics, vectors: TaskVectors) -> dict[str, Tensor]:
    return dict(method.informed(vectors, made))


def weight_name(layer: str) -> str:
    return f"{layer}.weight"


class Inputs:
    """What every linear layer of a plain model reads, example after example, without padding."""

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, kinds):
                layer.register_forward_pre_hook(lambda _, given, name=name: self._read(name, given[0]))

    def _read(self, name: str, states: Tensor) -> None:
        self.rows.setdefault(weight_name(name), []).append(states.flatten(0, -2).double())

    def moment(self, name: str) -> Tensor:
        rows = torch.cat(self.rows[name])
        return rows.T @ rows / len(rows)


@torch.no_grad()
def inputs_of(
    model: nn.Module,
    made: ExpertStatistics,
    expert: int,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> Inputs:
    """One example at a time: nothing is padded."""
    inputs = Inputs(model, kinds)
    for example in made.examples[expert]:
        model(**made.tokenizer.encode([example]).inputs)
    return inputs


def test_moments_are_of_the_experts_own_inputs_without_padding(languages: Path, tmp_path: Path) -> None:
    made, vectors = measure(languages_recipe(languages), tmp_path)
    for k, name in enumerate("ab"):
        plain = inputs_of(AutoModelForCausalLM.from_pretrained(languages / name), made, k)
        got = made.grams(k, list(vectors.deltas), {})
        assert got.keys() == {n for n in vectors.deltas if "proj" in n}  # embeddings are tied to the head
        for parameter, gram in got.items():
            torch.testing.assert_close(gram.double(), plain.moment(parameter), rtol=1e-4, atol=1e-6)


def test_regmean_is_the_least_squares_answer(world: Path, tmp_path: Path) -> None:
    made, vectors = measure(recipe(world), tmp_path)
    result = informed(tm.RegMean(shrink=1.0), made, vectors)
    for name in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.1.output.dense.weight"):
        delta = vectors.deltas[name]
        grams = [made.grams(k, [name], {})[name].double() for k in range(3)]
        merged = delta.base.double() + result[name].double().sum(0)
        experts = delta.base.double() + delta.dense().double()
        slope = sum((merged - w) @ g for w, g in zip(experts, grams, strict=True))
        scale = sum((delta.base - w) @ g for w, g in zip(experts, grams, strict=True))
        assert slope.norm() < 1e-4 * scale.norm()
    bias = "encoder.layer.0.output.dense.bias"
    torch.testing.assert_close(result[bias], vectors.deltas[bias].dense() / 3)


@pytest.mark.parametrize("sequential", [False, True])
def test_equal_experts_are_what_regmean_answers(languages: Path, tmp_path: Path, sequential: bool) -> None:
    merge = languages_recipe(languages)
    again = shutil.copytree(languages / "a", tmp_path / "again")
    twice = {"a": merge.experts["a"], "b": replace(merge.experts["b"], path=str(again))}
    made, vectors = measure(replace(merge, experts=twice), tmp_path)
    for name, taus in informed(tm.RegMean(sequential=sequential), made, vectors).items():
        # an input direction that nobody reads keeps the base: up to the ridge
        torch.testing.assert_close(taus.sum(0), vectors.deltas[name].dense()[0], rtol=1e-2, atol=2e-3)


def test_regmean_plus_plus_reads_merged_blocks(languages: Path, tmp_path: Path) -> None:
    made, vectors = measure(languages_recipe(languages), tmp_path)
    plain, result = (informed(tm.RegMean(sequential=s), made, vectors) for s in (False, True))
    last = [n for n in vectors.deltas if "layers.1." in n]
    merged = {
        n: d.base + result[n].sum(0)
        for n, d in vectors.deltas.items()
        if n not in last and "model.norm" not in n
    }
    grams = []
    for k, expert in enumerate("ab"):
        model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(languages / expert)
        model.load_state_dict(merged, strict=False)
        grams.append(inputs_of(model, made, k))
    name = "model.layers.1.self_attn.q_proj.weight"
    moments = [0.9 * g.moment(name) + 0.1 * g.moment(name).diag().diag() for g in grams]
    taus = vectors.deltas[name].dense().double()
    want = torch.stack([t @ m for t, m in zip(taus, moments, strict=True)]) @ torch.linalg.inv(sum(moments))
    torch.testing.assert_close(result[name].double(), want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(result[name], plain[name], rtol=1e-3, atol=1e-4)


def test_aim_reads_the_base_on_all_examples(languages: Path, tmp_path: Path) -> None:
    made, vectors = measure(languages_recipe(languages), tmp_path)
    plain = [AutoModelForCausalLM.from_pretrained(languages / "base") for _ in range(2)]
    kinds = (nn.Linear, type(plain[0].model.norm))
    read = [inputs_of(model, made, k, kinds) for k, model in enumerate(plain)]
    got = made.magnitudes(list(vectors.deltas))
    assert got.keys() == {n for n in vectors.deltas if "proj" in n or "norm" in n}
    for parameter, sizes in got.items():
        want = torch.cat([row for inputs in read for row in inputs.rows[parameter]]).abs().mean(0)
        torch.testing.assert_close(sizes.double(), want, rtol=1e-4, atol=1e-6)
    result = informed(tm.Aim(0.2), made, vectors)
    name, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    for parameter in (name, norm):
        factors = 1 - 0.8 * got[parameter] / got[parameter].max()
        torch.testing.assert_close(result[parameter], vectors.deltas[parameter].dense() * factors)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(result[embedding], vectors.deltas[embedding].dense())


def test_gradients_of_the_text_are_the_language_models_own(languages: Path, tmp_path: Path) -> None:
    made, _ = measure(languages_recipe(languages), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(languages / "b")
    for gradients, example in zip(made.gradients(1, sampled=False), made.examples[1], strict=True):
        plain.zero_grad()
        inputs = made.tokenizer.encode([example]).inputs
        plain(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    gradient = made.resident.merged.gradient()
    assert not gradient.any()  # nothing of this reached the coefficients


def test_sampled_gradients_are_of_whole_answers(languages: Path, tmp_path: Path) -> None:
    """Of -log p(y | x), summed over the positions of y: a long text says as much more as it is longer."""
    made, _ = measure(languages_recipe(languages), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(languages / "b")
    dice = torch.Generator().manual_seed(0)
    for gradients, example in zip(made.gradients(1, sampled=True), made.examples[1], strict=True):
        plain.zero_grad()
        log_p = plain(**made.tokenizer.encode([example]).inputs).logits[0, :-1].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=dice)
        (-log_p.gather(1, drawn)).sum().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_fisher_shares_out_by_squared_gradients(world: Path, tmp_path: Path) -> None:
    made, vectors = measure(recipe(world, grouping=tm.Grouping(exclude=["pooler.*"])), tmp_path)
    result = informed(tm.Fisher(), made, vectors)
    squares = []
    for k in range(3):
        each = list(made.gradients(k, sampled=True))
        means = {n: torch.stack([g[n].double() for g in each]).square().mean(0) for n in each[0]}
        norm = torch.cat([m.flatten() for m in means.values()]).norm()
        squares.append({n: (m / norm).clamp_min(1e-6) for n, m in means.items()})
    for name, delta in vectors.deltas.items():
        if name.startswith("pooler"):
            torch.testing.assert_close(result[name], delta.dense() / 3)
            continue
        total = sum(s[name] for s in squares)
        want = torch.stack([s[name] / total for s in squares]) * delta.dense()
        torch.testing.assert_close(result[name].double(), want, rtol=1e-4, atol=1e-7)


def test_rcp_adds_what_most_examples_vote_for(languages: Path, tmp_path: Path) -> None:
    made, vectors = measure(languages_recipe(languages), tmp_path)
    for weight in (0.0, 1000.0):
        result = informed(tm.Rcp("a", "b", weight), made, vectors)
        own, other = (list(made.gradients(k, sampled=False)) for k in range(2))
        for name, delta in vectors.deltas.items():
            kept, added = delta.base + delta.dense()
            guard = torch.stack([(g[name] * kept).square() for g in own]).mean(0)
            costs = torch.stack([g[name] * added + weight * guard * (kept - added) ** 2 for g in other])
            mask = (1 - 2 * (costs > 0).int()).sum(0) > 0
            assert torch.equal(result[name][0], delta.dense()[0])
            assert (result[name][1] != mask * delta.dense()[1]).float().mean() < 1e-3  # ties of rounding
    with pytest.raises(ValueError, match="merges two experts"):
        informed(tm.Rcp("a", "c"), made, vectors)


def rcp(weight: float, taus: dict[str, Tensor]) -> tuple[dict[str, Tensor], SoftmaxLayer]:
    """RCP's masks of the added expert, and what they were made of."""
    given = vectors(taus)
    got = dict(tm.Rcp("a", "b", weight).informed(given, SoftmaxLayer(given)))
    return {name: tau[1] != 0 for name, tau in got.items()}, SoftmaxLayer(given)


def test_rcp_between_all_and_nothing() -> None:
    taus = random(2)
    (guarded, layer), (free, _) = rcp(1e12, taus), rcp(0.0, taus)
    for name in ("layer.weight", "layer.bias"):  # F is above 0 and the experts differ: nothing is added
        assert not guarded[name].any()
    assert free["norm.weight"].all()  # no gradient, no cost: all is added
    weight = layer.given.deltas["layer.weight"].base + taus["layer.weight"][1]
    costs = torch.stack([g["layer.weight"] * weight for g in layer.gradients(1, sampled=False)])
    against = (costs > 0).sum(0)
    assert (against == 6).any()  # of 12 examples: a tie adds nothing
    assert torch.equal(free["layer.weight"], against < 6)


def test_regmean_measures_no_more_together_than_it_may(
    languages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = measure(languages_recipe(languages), tmp_path)
    whole = informed(tm.RegMean(), made, given)
    most = []
    grams = ExpertStatistics.grams

    def watched(self: ExpertStatistics, *asked: object) -> dict[str, Tensor]:
        moments = grams(self, *asked)
        most.append(sum(gram.nbytes for gram in moments.values()))
        return moments

    monkeypatch.setattr(ExpertStatistics, "grams", watched)
    monkeypatch.setattr(regmean, "MOMENTS", 5 * 4 * 32**2)
    for name, taus in informed(tm.RegMean(), made, given).items():
        assert torch.equal(taus, whole[name])
    assert len(most) > 4
    assert max(most) <= 5 * 4 * 32**2


def test_a_measured_merge_is_exported_and_its_loss_is_told(languages: Path, tmp_path: Path) -> None:
    merge = languages_recipe(languages, preprocess=[tm.RegMean()])
    module = tm.MergeModule(merge, initial=1.0, workspace=str(tmp_path / "run" / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    got = load_file(tm.export_run(tmp_path / "run", tmp_path / "merged") / "model.safetensors")
    made, vectors = measure(languages_recipe(languages), tmp_path / "again")
    for name, taus in informed(tm.RegMean(), made, vectors).items():
        torch.testing.assert_close(got[name], vectors.deltas[name].base + taus.sum(0), rtol=1e-5, atol=1e-6)
    (file,) = (tmp_path / "run" / "workspace").glob("*.safetensors")  # and nothing that was measured
    file.unlink()
    with pytest.raises(ValueError, match="RegMean on the calibration examples is missing; fit again"):
        tm.export_run(tmp_path / "run", tmp_path / "other")
    silent = languages_recipe(languages, preprocess=[tm.RegMean()])
    experts = {n: replace(e, calibration=None) for n, e in silent.experts.items()}
    module = tm.MergeModule(replace(silent, experts=experts), workspace=str(tmp_path / "none"))
    trainer = tm.make_trainer(tmp_path / "none", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="have no `calibration` file"):
        tm.fit(module, tm.Calibration({}, merge.base), trainer, tmp_path / "none")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tm.RegMean(shrink=1.5), "shrink"),
        (lambda: tm.Fisher(floor=0.0), "floor"),
        (lambda: tm.RegMean()(TaskVectors((), {})), "needs calibration examples"),
    ],
)
def test_settings_that_mean_nothing(build: object, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        build()


def test_a_bert_without_padding_has_the_same_moments(world: Path, tmp_path: Path) -> None:
    made, vectors = measure(recipe(world), tmp_path)
    plain = inputs_of(BertModel.from_pretrained(world / "experts" / "mood"), made, 0)
    for name, gram in made.grams(0, list(vectors.deltas), {}).items():
        if "pooler" not in name:  # reads the first position only
            torch.testing.assert_close(gram.double(), plain.moment(name), rtol=1e-4, atol=1e-6)


def test_task_vectors_are_made_before_the_model_takes_the_memory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = []

    def loading(*given: object) -> object:
        ready.append(len(list((tmp_path / "workspace").glob("task_vectors-*"))))
        return load_model(*given)

    monkeypatch.setattr(resident, "load_model", loading)
    measure(recipe(world, preprocess=[tm.Ties(0.3), tm.RegMean()]), tmp_path)
    assert ready == [1]  # RegMean needs the model
    assert len(list((tmp_path / "workspace").glob("task_vectors-*"))) == 2


def test_divergences_are_the_same_however_many_texts_wait(
    languages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = languages_recipe(languages)
    made, _ = measure(replace(merge, experts={"a": merge.experts["a"]}), tmp_path)
    texts, merged, became = made.examples[0], made.resident.merged, []
    teacher = merged.teacher
    monkeypatch.setattr(merged, "teacher", lambda expert: (became.append(expert), teacher(expert))[1])
    together = made.divergences(0, texts)
    assert became == [0]
    monkeypatch.setattr("trainmerge.model.text_statistics.PREDICTIONS", 0)
    assert torch.equal(made.divergences(0, texts), together)
    assert became == [0] * (1 + len(texts))


def test_fisher_of_float16_experts_loses_no_small_gradient(tmp_path: Path) -> None:
    """A sure model's gradients are below float16's least number."""
    base = llama().half()
    base.model.norm.weight.data.mul_(40)
    found = {}
    for dtype in (torch.float16, torch.float32):
        root = tmp_path / str(dtype)
        for seed, name in enumerate(("base", "a", "b")):
            model = deepcopy(base).float()
            nudge(model, seed, scale=2e-3 * bool(seed))
            model.half().to(dtype).save_pretrained(root / name)
            (root / f"{name}.jsonl").write_text('{"text": "good good good good cat dog bird"}\n' * 2)
        write_tokenizer(root / "base")
        made, _ = measure(languages_recipe(root), root)
        found[dtype] = squares(made.gradients(0, sampled=True))
    half, wide = found.values()
    assert sum(int((own != 0).sum()) for own in wide.values()) > 10_000
    assert not [name for name, own in wide.items() if bool(((own != 0) & (half[name] == 0)).any())]


def test_a_gradient_that_overflows_float16_is_computed_again() -> None:
    weight = nn.Parameter(torch.ones((), dtype=torch.float16))
    scale = LossScale(2.0**20)
    (slope,) = scaled_gradients((weight * 3).float(), [weight], scale)
    assert float(slope) == 3
    assert scale.value < 2.0**15
