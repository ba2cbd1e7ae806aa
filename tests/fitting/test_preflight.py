"""What a fit refuses before it makes its folder: tasks without a loss, experts without a sense."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trainmerge as tm
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.data.calibration import Calibration
from trainmerge.data.heads import Head
from trainmerge.fitting.preflight import check_tasks
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    write_languages(root / "languages")
    return root


def check(merge: Recipe, objective: tm.Objective | None = None) -> None:
    module = tm.MergeModule(merge, objective or tm.Entropy())
    check_tasks(module, Calibration(calibration_files(merge), merge.base, batch_size=2, max_length=8))


def with_head(merge: Recipe, name: str, head: Head | None) -> Recipe:
    return replace(merge, experts=merge.experts | {name: replace(merge.experts[name], head=head)})


def test_a_sound_recipe_passes(world: Path) -> None:
    check(recipe(world), tm.Entropy(diversity=1.0))
    check(languages_recipe(world / "languages"))


def test_a_model_without_an_output_needs_heads(world: Path) -> None:
    with pytest.raises(ValueError, match=r"base has no output layer, and \['colour'\] no `head`"):
        check(with_head(recipe(world), "colour", None))


def test_diversity_needs_classes(world: Path) -> None:
    with pytest.raises(ValueError, match=r"Entropy\(diversity=1.0.*\['a', 'b'\] have no `head`"):
        check(languages_recipe(world / "languages"), tm.Entropy(diversity=1.0))


def test_every_reason_in_one_error(world: Path) -> None:
    """The head of another model, and examples of which no token counts."""
    save_file({"w": torch.zeros(3, 16)}, world / "head.safetensors")
    silent = world / "silent.jsonl"
    silent.write_text('{"text": "red"}\n{"text": ""}\n')
    merge = with_head(recipe(world), "mood", tm.LinearHead(str(world / "head.safetensors"), "w", None))
    experts = merge.experts | {"colour": replace(merge.experts["colour"], calibration=str(silent))}
    with pytest.raises(ValueError, match=r"mood\.head has hidden size 16.*has 32") as error:
        check(replace(merge, experts=experts))
    assert f"{silent}: 1 of 2 examples are blank or have no unmasked token, the first is number 1" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"a": tm.Expert("x"), "b": tm.Expert("y/../x")}, r"experts\.b: y/\.\./x is already a"),
        ({"a": tm.Expert("x/../base")}, r"is already the base"),
        ({"base": tm.Expert("x")}, "not valid names"),
        ({1: tm.Expert("x")}, r"the name 1 is not a text: write '1'"),
        ({"a": tm.Expert("x", weight=0.0)}, "every weight is 0"),
    ],
)
def test_recipes_that_mean_nothing(experts: dict[str, tm.Expert], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe("base", experts)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none(weight: float) -> None:
    with pytest.raises(ValueError, match=r"expert x\.weight must be"):
        tm.Expert("x", weight=weight)
