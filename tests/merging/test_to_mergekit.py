"""A run written as mergekit's YAML merges to the run's export, or is refused in words."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import trainmerge as tm
from tests.world import languages_recipe, write_languages
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import save_coefficients
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import save_moment


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def run_of(
    world: Path, folder: Path, values: object, granularity: str = "tensor", *methods: tm.Preprocess
) -> Path:
    """A run without steps, its coefficients replaced: `values` per expert, a number or random."""
    grouping = tm.Grouping(
        granularity, exclude=["model.norm.weight"], chunks=2 if granularity == "chunk" else 1
    )
    recipe = languages_recipe(world, grouping=grouping, preprocess=methods)
    module = tm.MergeModule(recipe, initial=0.3, workspace=str(folder / "workspace"))
    trainer = tm.make_trainer(folder, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, str(world / "base")), trainer, folder)
    learned = module.coefficients
    if values is None:
        learned.reset_(torch.rand(learned.raw.shape, generator=torch.Generator().manual_seed(0)))
    else:
        learned.reset_(torch.tensor(values)[:, None].expand_as(learned.raw))
    save_coefficients(learned, folder / "coefficients.safetensors")
    save_moment(RunFolder(folder), learned, 0, 0)
    return folder


CASES = [
    (None, "tensor", ()),
    (None, "block", ()),
    ([0.3, 0.7], "task", ()),
    ([0.4, 0.4], "task", (tm.Ties(0.3, "parameter", "mean"),)),
    ([0.4, 0.4], "task", (tm.Ties(0.3, "parameter", "sum"),)),
    (None, "tensor", (tm.Breadcrumbs(0.5, 0.1),)),
]


@pytest.mark.parametrize(("values", "granularity", "methods"), CASES)
def test_the_file_merges_to_the_export(
    world: Path, tmp_path: Path, values: object, granularity: str, methods: tuple[tm.Preprocess, ...]
) -> None:
    run = run_of(world, tmp_path / "run", values, granularity, *methods)
    tm.export_run(run, tmp_path / "exported")
    assert main(["export", str(run), str(tmp_path / "m.yml"), "--mergekit"]) == 0
    tm.merge_file(tmp_path / "m.yml", tmp_path / "merged")
    exported = load_file(tmp_path / "exported/model.safetensors")
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(tensor, exported[name], rtol=1e-6, atol=1e-7)


def test_what_it_cannot_say_is_refused(world: Path, tmp_path: Path) -> None:
    methods = (tm.Ties(0.3, "global"), tm.Dare(0.1))
    run = run_of(world, tmp_path / "run", None, "chunk", *methods)
    with pytest.raises(ValueError, match="cannot express") as caught:
        tm.to_mergekit(run, tmp_path / "m.yml")
    words = str(caught.value)
    for part in (
        "rows of one tensor",
        "several preprocessors",
        "ranks over all tensors",
        "Dare is no method",
    ):
        assert part in words
    assert not (tmp_path / "m.yml").exists()
    uneven = run_of(world, tmp_path / "uneven", [0.3, 0.4], "task", tm.Ties(0.3, "parameter"))
    with pytest.raises(ValueError, match="elects signs after weighting"):
        tm.to_mergekit(uneven, tmp_path / "m.yml")


def test_one_number_per_block_is_a_gradient_where_it_can_be(world: Path, tmp_path: Path) -> None:
    from trainmerge.merging.to_mergekit import _shortest

    names = [f"model.layers.{i}.w" for i in range(3)] + ["lm_head.weight"]
    assert _shortest(dict(zip(names, [0.1, 0.2, 0.4, 0.1], strict=True)), names) == [0.1, 0.2, 0.4]
    assert _shortest(dict.fromkeys(names, 0.5), names) == 0.5
    by_name = _shortest(dict(zip(names, [0.1, 0.2, 0.4, 0.3], strict=True)), names)
    assert {entry["filter"]: entry["value"] for entry in by_name} == dict(
        zip(names, [0.1, 0.2, 0.4, 0.3], strict=True)
    )
    file = tm.to_mergekit(run_of(world, tmp_path / "run", [0.3, 0.3], "task"), tmp_path / "m.yml")
    content = yaml.safe_load(file.read_text())
    assert content["merge_method"] == "task_arithmetic"
    assert (content["dtype"], content["out_dtype"]) == ("float32", "float32")
