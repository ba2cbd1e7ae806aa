"""The share of tokens that reach the same experts as in each fine-tune, and routers calibrated for it.

Legend: `K` fine-tunes, `T` tokens of a text.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainmerge as tm
from tests.mixture_world import write_mixture
from tests.world import write_languages
from trainmerge.cli import main
from trainmerge.preprocess.router_calibration import router_divergence
from trainmerge.run.recipe_files import calibration_files

SCALE = 0.4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE and two fine-tunes whose routers are far apart, with texts."""
    return write_mixture(tmp_path_factory.mktemp("world"))


def fit(root: Path, run: Path, names: str = "ab", scale: float = SCALE, **changes: object) -> Path:
    experts = {n: tm.Expert(str(root / n), str(root / f"{n}.jsonl"), str(root / f"{n}.jsonl")) for n in names}
    recipe = tm.Recipe(str(root / "base"), experts, **changes)
    module = tm.MergeModule(recipe, initial=scale, workspace=str(run / "workspace"))
    trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    data = tm.Calibration(calibration_files(recipe), recipe.base)
    tm.fit(module, data, trainer, run)
    return run


@torch.no_grad()
def read(model: nn.Module, root: Path, task: str) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer: what the router reads, [T, H], and its top two of four by the logits, sorted, [T, 2]."""
    words = AutoTokenizer.from_pretrained(root / "base")
    states: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda _, given, i=i: states[i].append(given[0].flatten(0, -2))
        )
        for i, layer in enumerate(model.model.layers)
    ]
    for line in (root / f"{task}.jsonl").read_text().splitlines():
        model(**words(json.loads(line)["text"], return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    rows = [torch.cat(own) for own in states]
    logits = [x @ layer.mlp.gate.weight.T for x, layer in zip(rows, model.model.layers, strict=True)]
    return rows, [own.topk(2).indices.sort().values for own in logits]


def test_agreement_is_that_of_transformers_own_models(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(world, tmp_path / "run")
    found = tm.evaluate_run(run, grid=(0.3,))
    tm.export_run(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    for task in "ab":
        _, own = read(AutoModelForCausalLM.from_pretrained(world / task), world, task)
        for row, model in {"learned": merged, "base": base}.items():
            _, theirs = read(model, world, task)
            for layer, (one, other) in enumerate(zip(own, theirs, strict=True)):
                want = float((one == other).all(-1).float().mean())
                assert found.agreement[row][task][f"model.layers.{layer}.mlp.gate"] == pytest.approx(want)
    assert min(found.layers()["model.layers.0.mlp.gate"].values()) < 1
    assert main(["evaluate", str(run), "--no-compare", "--output", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.gate" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["learned"]["routing"]["a"] == found.agreement["learned"]["a"]
    page = tm.write_report(run)
    rows = list(csv.reader((page.parent / "routing.csv").read_text().splitlines()))
    assert rows[0] == ["router", "learned"]
    means = [f"{share:.6f}" for share in (own["learned"] for own in found.layers().values())]
    assert [f"{float(row[1]):.6f}" for row in rows[1:]] == means
    assert "same set of experts" in page.read_text()


def test_a_fine_tune_agrees_with_itself(world: Path, tmp_path: Path) -> None:
    run = fit(world, tmp_path / "run", names="a", scale=1.0)
    shares = tm.evaluate_run(run, grid=(0.3,)).agreement
    assert {*shares["learned"]["a"].values()} == {*shares["average"]["a"].values()} == {1.0}
    assert min(shares["base"]["a"].values()) < 1


def slope(model: nn.Module, world: Path, layer: int) -> Tensor:
    """The gradient of the sum of divergences at a model's router."""
    rows = model.model.layers[layer].mlp.gate.weight.detach().double().requires_grad_(True)
    parts = []
    for task in "ab":
        own = AutoModelForCausalLM.from_pretrained(world / task).model.layers[layer].mlp.gate.weight
        parts.append(
            router_divergence(rows, read(model, world, task)[0][layer].double(), own.detach().double())
        )
    (found,) = torch.autograd.grad(torch.stack(parts).sum(), rows)
    return found


def test_calibrated_routers_are_the_minimum_in_the_exported_model(world: Path, tmp_path: Path) -> None:
    plain = fit(world, tmp_path / "plain")
    runs = {"plain": plain}
    for loss in ("kl", "harc"):
        method = tm.CalibratedRouters(loss, scale=SCALE)
        runs[loss] = fit(world, tmp_path / loss, preprocess=[method])
    models = {}
    for name, run in runs.items():
        tm.export_run(run, tmp_path / f"{name}-merged")
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
    for layer in range(2):
        best, first = (slope(models[name], world, layer).norm() for name in ("kl", "plain"))
        assert best < 1e-2 * first
    for (name, ours), theirs in zip(
        models["kl"].named_parameters(), models["plain"].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs) == ("gate.weight" not in name)
    assert not torch.equal(*(models[n].model.layers[0].mlp.gate.weight for n in ("harc", "kl")))
    assert tm.verify_export(runs["kl"], tmp_path / "kl-merged")
    # only the routers are in the workspace
    (file,) = (runs["kl"] / "workspace").glob("task_vectors-*.safetensors")
    assert file.stat().st_size < 3 * 2 * 2 * 4 * 32 * 4


def test_a_merge_without_routers_has_none_to_calibrate(tmp_path: Path) -> None:
    write_languages(tmp_path)
    with pytest.raises(ValueError, match="no fine-tune changes a router"):
        fit(tmp_path, tmp_path / "run", preprocess=[tm.CalibratedRouters()])
