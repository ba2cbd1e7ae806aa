"""`recipe.each`: one description for all experts."""

from pathlib import Path

import pytest

from trainmerge.run.config import read_config
from trainmerge.run.recipe import Recipe
from trainmerge.run.templates import expand

EACH = {"path": "experts/{name}", "calibration": "{name}/texts.jsonl", "weight": 2.0}
HEAD = {"class_path": "trainmerge.LabelHead", "init_args": {"labels": "{name}/labels.json"}}


def test_names_are_filled_in() -> None:
    written = expand({"recipe": {"base": "b", "each": EACH, "experts": ["news", "movie"]}, "data": 1})
    experts = {n: {"path": f"experts/{n}", "calibration": f"{n}/texts.jsonl", "weight": 2.0} for n in
               ("news", "movie")}  # fmt: skip
    assert written == {"recipe": {"base": "b", "experts": experts}, "data": 1}


def test_an_experts_own_fields_win() -> None:
    own = {"news": None, "movie": {"weight": 0.5, "head": HEAD}}
    written = expand({"recipe": {"each": EACH, "experts": own}})["recipe"]["experts"]
    assert written["news"]["weight"] == 2.0
    assert written["movie"]["weight"] == 0.5
    assert written["movie"]["head"]["init_args"] == {"labels": "movie/labels.json"}
    assert own["movie"] == {"weight": 0.5, "head": HEAD}  # no argument is changed


@pytest.mark.parametrize("config", [None, [], {"data": 1}, {"recipe": {"experts": {"a": {"path": "{x}"}}}}])
def test_configurations_without_a_template_stay(config: object) -> None:
    assert expand(config) is config


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"each": {"path": "experts/{nam}"}, "experts": ["news"]}, "news.*{nam}; only {name}"),
        ({"each": {"calibration": "{name}"}, "experts": ["news"]}, "news has no path"),
        ({"each": EACH, "experts": []}, "list their names"),
        ({"each": EACH}, "list their names"),
        ({"each": "experts/{name}", "experts": ["news"]}, "must be a mapping"),
        ({"each": EACH, "experts": {"news": "experts/news"}}, "news must be a mapping"),
    ],
)
def test_what_cannot_be_filled_in(recipe: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expand({"recipe": recipe})


def test_every_reader_of_a_recipe_fills_in(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("recipe:\n  base: b\n  each:\n    path: experts/{name}\n  experts: [news, movie]\n")
    recipe = read_config(Recipe, "recipe", file)
    assert [expert.path for expert in recipe.experts.values()] == ["experts/news", "experts/movie"]
    file.write_text("recipe:\n  base: b\n  each:\n    path: experts/{nam}\n  experts: [news]\n")
    with pytest.raises(ValueError, match=r"config\.yaml: recipe\.experts\.news"):
        read_config(Recipe, "recipe", file)


@pytest.mark.parametrize("experts", [["a", "b", "a"], ["a", {"b": {}}]])
def test_a_list_of_experts_has_different_names(experts: list) -> None:
    with pytest.raises(ValueError, match="must list different names"):
        expand({"recipe": {"each": {"path": "{name}"}, "experts": experts}})
