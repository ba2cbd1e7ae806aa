"""Class paths in files: written as public ones, read as those of any version."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest

import trainmerge as tm
from tests.methods import METHODS
from trainmerge.run.config import build, public_path, public_paths, read_config, to_config, write_config
from trainmerge.run.manifest import differences

HEAD = tm.LabelHead(["yes", "no"])
PLUG_INS = [
    (tm.Preprocess, METHODS.values()),
    (tm.Objective, [tm.Entropy(), tm.Alignment(hidden=1.0, layers=[1])]),
    (tm.Constraint, [tm.Free(), tm.Box(), tm.Sigmoid(), tm.Simplex()]),
    (tm.Quantise, [tm.Int8(), tm.Ternary()]),
    (tm.Head, [HEAD, tm.LinearHead("head.safetensors")]),
]
ALL = [(kind, value) for kind, values in PLUG_INS for value in values]


@dataclass(frozen=True)
class Twice(tm.Sigmoid):
    """A user's own constraint."""


@pytest.mark.parametrize(("kind", "value"), ALL, ids=lambda v: type(v).__name__)
def test_a_plug_in_is_written_by_its_public_path_and_read_by_that_and_its_module(
    kind: type, value: object
) -> None:
    content = to_config(value)
    name, module = type(value).__name__, type(value).__module__
    assert content["class_path"] == f"trainmerge.{name}"
    assert build(kind, content, "x") == build(kind, {**content, "class_path": f"{module}.{name}"}, "x")
    assert to_config(build(kind, content, "x")) == content


@pytest.mark.parametrize(
    "kind", [tm.Preprocess, tm.Objective, tm.Preset, tm.Constraint, tm.Quantise, tm.Head]
)
def test_every_plug_in_of_the_package_is_public(kind: type) -> None:
    for name in tm.__all__:
        getattr(tm, name)  # imported, so that it is a subclass by now
    kinds, found = [kind], set()
    while kinds:
        found |= (below := set(kinds.pop().__subclasses__()))
        kinds += below
    ours = {cls for cls in found if cls.__module__.startswith("trainmerge.") and not inspect.isabstract(cls)}
    assert ours
    assert all(getattr(tm, cls.__name__, None) is cls for cls in ours)


def test_modules_that_are_gone_and_those_of_others() -> None:
    assert public_path("trainmerge.constraints.Box") == "trainmerge.Box"
    assert public_path("trainmerge.Box") == "trainmerge.Box"
    for other in (
        "trainmerge.fit",
        "trainmerge.constraints.Boxes",
        "trainmerge/runs.Box",
        "my.Box",
        "Box",
        "",
    ):
        assert public_path(other) == other
    nested = {"a": [{"class_path": "trainmerge.heads.LabelHead"}, 1, None], "trainmerge.x.Box": b"x"}
    assert public_paths(nested) == {
        "a": [{"class_path": "trainmerge.LabelHead"}, 1, None],
        "trainmerge.x.Box": b"x",
    }


def test_a_users_own_class_keeps_its_path() -> None:
    content = to_config(Twice())
    assert content == {"class_path": f"{__name__}.Twice", "init_args": {}}
    assert build(tm.Constraint, content, "x") == Twice()


def test_recipes_of_both_forms_are_the_same(tmp_path: Path) -> None:
    recipe = tm.Recipe("base", {"a": tm.Expert("a", head=HEAD)}, [tm.Ties(0.5)])
    file = tmp_path / "recipe.yaml"
    write_config(recipe, "recipe", file)
    text = file.read_text()
    assert "class_path: trainmerge.Ties" in text
    assert "class_path: trainmerge.LabelHead" in text
    old = text.replace("trainmerge.Ties", "trainmerge.preprocess.ties.Ties")
    file.write_text(old.replace("trainmerge.LabelHead", "trainmerge.heads.LabelHead"))
    read = read_config(tm.Recipe, "recipe", file)
    assert (read.experts, read.preprocess) == (recipe.experts, recipe.preprocess)


def test_a_class_that_has_moved_is_no_difference_and_another_class_is() -> None:
    made = {"objective": {"class_path": "trainmerge.objectives.entropy.Entropy", "init_args": {}}, "clip": 0}
    now = {"objective": {"class_path": "trainmerge.Entropy", "init_args": {}}, "clip": 0}
    assert differences(made, now) == ""
    now["objective"]["class_path"] = "trainmerge.Alignment"
    assert differences(made, now) == (
        '  objective.class_path: "trainmerge.Entropy" then, "trainmerge.Alignment" now'
    )
