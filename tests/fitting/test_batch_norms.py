"""Batch norms in folders of transformers: `recipe.buffers` from experts' statistics to exported ones.

Legend: `B` pictures of a batch, `F` features of a batch norm.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import trainmerge as tm
from tests.bounds import assert_within, sum_bound
from tests.contracts import assert_same_bits
from tests.fitting.test_pictures import RESNET, fit, parts, right
from tests.picture_world import TASKS, build, vit, write_picture_world
from trainmerge.cli import main
from trainmerge.model.statistics import even_parts
from trainmerge.run.config import to_config
from trainmerge.task_vectors.buffers import BufferRule
from trainmerge.task_vectors.state_dicts import STATISTICS

RULES: tuple[BufferRule, ...] = ("keep", "average", "reestimate")
LAYERS, TERMS = 12, 12 * 16 * 16  # of the net; entries of a feature in a batch, and more than of a product


def resnet() -> nn.Module:
    return build("ResNetForImageClassification", {**RESNET, "num_labels": 3})


def pixels(folder: Path, base: Path) -> Tensor:
    """The calibration pictures of a task [B, 3, H, W]."""
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    return processor(images=[Image.open(p) for p in sorted(folder.glob("*.png"))], return_tensors="pt")[
        "pixel_values"
    ]


@pytest.fixture
def world(tmp_path: Path) -> tm.Recipe:
    """Experts whose statistics are those of their own pictures."""
    merge = write_picture_world(tmp_path, resnet)
    for task in TASKS:
        place = merge.experts[task].path
        expert = AutoModelForImageClassification.from_pretrained(place).train()
        with torch.no_grad():
            for _ in range(8):
                expert(pixel_values=pixels(tmp_path / task / "calibration", tmp_path / "base"))
        expert.save_pretrained(place)
    return merge


def statistics(folder: Path | str) -> dict[str, Tensor]:
    state = load_file(Path(folder) / "model.safetensors")
    return {n: t for n, t in state.items() if STATISTICS.search(n) and t.is_floating_point()}


def merged(merge: tm.Recipe, root: Path, rule: BufferRule | None, **settings: Any) -> tuple[Path, Path]:
    """A fit with a rule, and its export: the folders of both."""
    run = root / f"run-{rule}"
    fit(*parts(replace(merge, buffers=rule), run, **settings), run)
    return run, tm.export_run(run, root / f"merged-{rule}")


@pytest.mark.parametrize("rule", RULES)
def test_every_row_of_the_table_is_what_transformers_gives(
    world: tm.Recipe, tmp_path: Path, rule: BufferRule
) -> None:
    """Experts have their own statistics under every rule, and the merge those of its export."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*statistics of its own")
        run, out = merged(world, tmp_path, rule)
    scores = tm.evaluate_run(run).scores
    for task in TASKS:
        test = tmp_path / task / "test"
        assert scores["expert"][task] == pytest.approx(right(Path(world.experts[task].path), test))
        assert scores["learned"][task] == pytest.approx(right(out, test))
        assert scores["base"][task] == pytest.approx(right(Path(world.base), test))
    assert tm.verify_export(run, out) > 0


def test_kept_and_averaged_statistics_are_exported(world: tm.Recipe, tmp_path: Path) -> None:
    shares = {"shade": 3.0, "hue": 1.0}
    weighted = {task: replace(world.experts[task], weight=shares[task]) for task in TASKS}
    world = replace(world, experts=weighted)
    base, own = statistics(world.base), [statistics(world.experts[task].path) for task in TASKS]
    assert len(base) > 6
    for name, kept in statistics(merged(world, tmp_path, "keep")[1]).items():
        assert_same_bits(kept, base[name])
        assert not torch.equal(kept, own[0][name])
    for name, mean in statistics(merged(world, tmp_path, "average")[1]).items():
        want = sum(shares[task] * own[k][name].double() for k, task in enumerate(TASKS)) / 4
        assert_same_bits(mean, want.to(mean.dtype))


def test_reestimated_statistics_are_the_calibration_batches_moments(world: tm.Recipe, tmp_path: Path) -> None:
    """Against the merge in float64, whose batch norms normalise by the batch: one batch per task."""
    out = merged(world, tmp_path, "reestimate")[1]
    model = AutoModelForImageClassification.from_pretrained(out).double().eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.train()
        norm.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].double()))
    with torch.no_grad():
        for task in TASKS:
            model(pixel_values=pixels(tmp_path / task / "calibration", tmp_path / "base").double())
    found = statistics(out)
    for name, (first, second) in seen.items():
        over = (0, 2, 3)
        mean = (first.mean(over) + second.mean(over)) / 2
        var = (first.var(over) + second.var(over)) / 2
        size = (first.square().mean(over) + second.square().mean(over)) / 2 + 1
        for key, want in {"running_mean": mean, "running_var": var}.items():
            assert_within(found[f"{name}.{key}"], want, sum_bound(size, LAYERS * TERMS, torch.float32))
            assert not torch.allclose(
                found[f"{name}.{key}"].double(), statistics(world.base)[f"{name}.{key}"].double()
            )


def test_a_finished_run_keeps_its_statistics_and_an_interrupted_one_measures_the_same(
    world: tm.Recipe, tmp_path: Path
) -> None:
    run, _ = merged(world, tmp_path, "reestimate")
    before = (run / "statistics.safetensors").read_bytes()
    fit(*parts(replace(world, buffers="reestimate"), run), run)
    assert (run / "statistics.safetensors").read_bytes() == before
    (run / "statistics.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no statistics of batch norms of these coefficients"):
        tm.export_run(run, tmp_path / "again")
    fit(*parts(replace(world, buffers="reestimate"), run), run)
    assert (run / "statistics.safetensors").read_bytes() == before
    for steps in (1, 3):
        fit(*parts(replace(world, buffers="reestimate"), tmp_path / "parts"), tmp_path / "parts", steps)
    assert (tmp_path / "parts" / "statistics.safetensors").read_bytes() == before


def test_a_merge_without_steps_has_statistics_of_its_own(world: tm.Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(*parts(replace(world, buffers="reestimate"), run, initial=0.5), run, steps=0)
    module, data = parts(replace(world, buffers="reestimate"), tmp_path / "other", initial=0.5)
    module.load(data)
    module.resident.merged.materialise()
    out = tm.export_run(run, tmp_path / "merged")
    own = dict(module.resident.merged.module.named_buffers())
    for name, value in statistics(out).items():
        assert_same_bits(value, own[name])


def test_without_a_rule_they_are_kept_with_a_warning(world: tm.Recipe, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"expert (shade|hue) has statistics of its own.*`recipe.buffers: average`"
    ):
        _, out = merged(world, tmp_path, None)
    for name, value in statistics(out).items():
        assert_same_bits(value, statistics(world.base)[name])


def test_a_tower_as_base_has_the_experts_statistics_too(world: tm.Recipe, tmp_path: Path) -> None:
    """The names of base and experts differ by the prefix of the tower."""
    AutoModel.from_pretrained(world.base).save_pretrained(world.base)
    run, out = merged(world, tmp_path, "average", objective=tm.Alignment())
    own = [statistics(world.experts[task].path) for task in TASKS]
    for name, mean in statistics(out).items():
        first, second = (state[f"resnet.{name}"].double() for state in own)
        assert_same_bits(mean, ((first + second) / 2).float())
    scores = tm.evaluate_run(run).scores
    for task in TASKS:
        whole = tm.export_run(run, tmp_path / f"whole-{task}", task=task)
        assert scores["learned"][task] == pytest.approx(right(whole, tmp_path / task / "test"))
        place = Path(world.experts[task].path)
        assert scores["expert"][task] == pytest.approx(right(place, tmp_path / task / "test"))


def test_what_holds_no_statistics_is_refused(world: tm.Recipe, tmp_path: Path) -> None:
    run, out = merged(world, tmp_path, "reestimate")
    with pytest.raises(ValueError, match=r"neither an adapter nor a packed folder"):
        tm.export_adapter(run, tmp_path / "adapter", tm.AdapterForm(rank=2))
    with pytest.raises(ValueError, match=r"neither an adapter nor a packed folder"):
        tm.export_packed(run, tmp_path / "packed", tm.PackedForm("mask"))
    with pytest.raises(ValueError, match=r"measured on calibration examples, which a card"):
        tm.rebuild(out, tmp_path / "rebuilt")
    plain = write_picture_world(tmp_path / "plain", vit)
    with pytest.raises(ValueError, match=r"recipe.buffers is average, and .* has no batch norm"):
        replace(plain, buffers="average").open()
    with pytest.raises(ValueError, match=r"recipe.buffers"):
        replace(plain, buffers="mean")  # type: ignore[arg-type]


def test_averaged_statistics_are_rebuilt(
    world: tm.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = merged(world, tmp_path, "average")
    monkeypatch.chdir(tmp_path)
    for task in TASKS:
        if Path(task).exists():
            Path(task).rename(f"{task}-pictures")
        Path(task).symlink_to(tmp_path / "experts" / task)
    again = tm.rebuild(out, tmp_path / "rebuilt")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_configuration_has_the_rule(world: tm.Recipe, tmp_path: Path) -> None:
    settings = {
        "recipe": to_config(replace(world, buffers="reestimate")),
        "model": {
            "objective": {"class_path": "trainmerge.Entropy"},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
        },
        "data": {"batch_size": 2, "columns": {"text": None, "image": "image"}},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False},
        "report": False,
    }
    assert settings["recipe"]["buffers"] == "reestimate"
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", str(tmp_path / "merge.yaml"), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--verify"]) == 0
    assert (tmp_path / "run" / "statistics.safetensors").is_file()
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_parts_are_even() -> None:
    sizes = [len(part) for part in even_parts([None] * 70, 32)]  # type: ignore[list-item]
    assert sizes == [24, 23, 23]
    assert [*even_parts([], 32)] == []
