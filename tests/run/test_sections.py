"""A configuration whose sections are no mappings, or that sets a linked key, is refused."""

from pathlib import Path

import pytest
import yaml

from tests.world import write_world
from trainmerge.cli import main
from trainmerge.fitting.from_config import from_config
from trainmerge.run.config import to_config
from trainmerge.run.sections import LINKED, check_sections


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    content = {
        "recipe": to_config(write_world(root)),
        "data": {"batch_size": 4, "max_length": 16},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 5}, "model must be a mapping of its keys, not 5"),
        ({"data": []}, "data must be a mapping of its keys, not []"),
        ({"trainer": "x"}, "trainer must be a mapping of its keys, not 'x'"),
        ({"model": {"anchor": []}}, "model.anchor must be a mapping of its keys, not []"),
        ({"recipe": {"grouping": "task"}}, "recipe.grouping must be a mapping of its keys, not 'task'"),
        (
            {"recipe": {"experts": {"a": None}, "held_out": {"b": "path"}}},
            "recipe.experts.a must be a mapping of its fields, not None; "
            "recipe.held_out.b must be a mapping of its fields, not 'path'",
        ),
        (
            {"recipe": {"experts": ["a"]}},
            "recipe.experts must be a mapping of names, not a list (lists of names go with recipe.each)",
        ),
        ([], "a configuration must be a mapping with a section `recipe`, not []"),
        (None, "a configuration must be a mapping with a section `recipe`, not None"),
        (
            {"data": {"seed": 3}},
            "data.seed is taken from seed_everything: remove it, and set seed_everything",
        ),
        ({"data.seed": 3}, "data.seed is taken from seed_everything: remove it, and set seed_everything"),
        (
            {"model": {"recipe": {}}, "data": 5},
            "data must be a mapping of its keys, not 5; model.recipe is taken from recipe: remove it, and "
            "set recipe",
        ),
    ],
)
def test_unusable_content_in_words(content: object, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        check_sections(content)
    assert str(error.value) == message


def test_a_section_without_a_value_is_refused_and_a_group_is_empty() -> None:
    check_sections({"recipe": {"grouping": None}})
    with pytest.raises(ValueError, match="model is empty: give it keys, or remove it"):
        check_sections({"recipe": {}, "model": None})


@pytest.mark.parametrize("key", LINKED)
def test_linked_keys_are_refused_wherever_they_are_given(config: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is taken from "):
        from_config(config, tmp_path / "run", {key: 3})
    section, _, name = key.partition(".")
    own = yaml.safe_load(config.read_text())
    own[section] = {**own.get(section, {}), name: 3}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(ValueError, match=rf"own\.yaml: {key} is taken from "):
        from_config(tmp_path / "own.yaml", tmp_path / "run")


def test_the_command_line_too_and_its_remedy_works(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", str(config), str(tmp_path / "run")]
    assert main([*words, "--data.seed=3"]) == 1
    assert main([*words, "--model=5"]) == 1
    assert main([*words, "--data={seed: 3}"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert ["seed_everything" in error for error in errors] == [True, False, True]
    assert "model must be a mapping" in errors[1]
    assert not (tmp_path / "run").exists()
    assert from_config(config, tmp_path / "run", {"seed_everything": 3}).data.seed == 3


def test_a_run_folder_needs_a_name(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config), "--run="]) == 1
    assert "run must be a text that is not blank" in capsys.readouterr().err
