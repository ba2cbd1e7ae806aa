"""What inspect finds in recipes that have something wrong with them, and what it suggests."""

import json
import re
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import trainmerge as tm
from tests.cli.test_cli import write_config
from tests.embedders import write_embedders
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.cli import main
from trainmerge.fitting.forecast_fit import forecast_config
from trainmerge.inspection import inspect_path
from trainmerge.inspection.attention import changes
from trainmerge.inspection.suggest import suggest
from trainmerge.run.config import to_config
from trainmerge.run.config import write_config as write_recipe
from trainmerge.run.recipe import Recipe


def change(folder: Path, **tensors: torch.Tensor | float) -> None:
    """Replace tensors of a checkpoint by others, or by multiples of themselves."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, value in tensors.items():
        state[name] = state[name] * value if isinstance(value, float) else value
    save_file(state, path, {"format": "pt"})


def found(place: Path, merge: Recipe, **options: object) -> str:
    """What is found in this recipe, a line each."""
    file = place / "looked-at.yaml"
    write_recipe(merge, "recipe", file)
    return "\n".join(f"{f.level}: {f.what}" for f in inspect_path(file, **options))  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path)
    return tmp_path


QUERY, KEY = (f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key"))


def test_twins_outliers_scratch_and_a_shifted_gauge(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {name: expert for name, expert in recipe(world).experts.items() if name != "animal"}
    assert "warning" not in found(world, recipe(world, experts=full))
    experts = world / "experts"
    shutil.copytree(experts / "mood", experts / "twin")
    shutil.copytree(experts / "mood", experts / "far")
    shutil.copytree(world / "base", experts / "turned")
    shutil.copytree(world / "base", experts / "still")
    base = load_file(world / "base" / "model.safetensors")
    mine = load_file(experts / "far" / "model.safetensors")
    change(experts / "far", **{name: base[name] + 9 * (mine[name] - base[name]) for name in base})
    change(experts / "colour", **{"pooler.dense.weight": torch.randn(32, 32)})
    change(experts / "turned", **{QUERY: 3.0, KEY: 1 / 3})
    merge = recipe(world)
    more = {
        name: replace(merge.experts["mood"], path=str(experts / name))
        for name in ("twin", "far", "still", "turned")
    }
    text = found(world, replace(merge, experts={**merge.experts, **more}), output=world / "found.json")
    assert "the task vectors of mood and twin are nearly parallel" in text
    assert "far: the norm of its task vector" in text
    assert "still is bitwise equal to the base" in text
    assert "colour: pooler.dense.weight are nearly orthogonal to the base" in text
    assert "turned: the attention weights of encoder.layer.0 (query and key)" in text
    assert text.count("attention weights of") == 1
    content = json.loads((world / "found.json").read_text())
    assert content["geometry"]["experts"] == ["mood", "colour", "animal", *more]
    assert content["merged_parameters"] == 39
    assert "were not checked" in found(world, merge, weights="no")
    assert "cos mood" not in capsys.readouterr().out.rpartition("base and experts")[2]


def test_weights_that_are_not_finite_are_an_error(world: Path) -> None:
    """A fit refuses them; norms and cosines of them say nothing."""
    dense = "encoder.layer.0.output.dense.weight"
    change(world / "experts" / "mood", **{dense: float("nan")})
    text = found(world, recipe(world))
    assert f"error: mood: {dense} have NaN or infinite values, or the base has" in text
    assert "could not be checked" not in text


def test_sparse_experts_that_overlap_little(world: Path) -> None:
    """As reinforcement learning leaves them: one entry of twenty, others in each expert."""
    base = load_file(world / "base" / "model.safetensors")
    merge = recipe(world)
    full = {name: expert for name, expert in merge.experts.items() if name != "animal"}
    for number, name in enumerate(full):
        dice = torch.Generator().manual_seed(number)
        own = {n: t + 0.1 * (torch.rand(t.shape, generator=dice) < 0.05) for n, t in base.items()}
        change(world / "experts" / name, **own)
    merge = replace(merge, experts=full)
    text = found(world, merge, output=world / "found.json")
    assert "note: the experts changed few entries (mood 5%, colour 5%)" in text
    settings = json.loads((world / "found.json").read_text())["suggestion"]["settings"]
    assert [step["class_path"] for step in settings["recipe"]["preprocess"]] == ["trainmerge.Ram"]
    assert settings["model"]["initial"] == 1.0
    assert "trainmerge.Ram" in str(suggest(merge, {}, None, sparse=True).settings)
    full_rank = {n: t + 0.1 * torch.randn(t.shape) for n, t in base.items()}
    change(world / "experts" / "mood", **full_rank)
    assert "few entries" not in found(world, merge)


def test_texts_tensors_and_templates(world: Path) -> None:
    merge = recipe(world)
    lines = (world / "mood" / "calibration.jsonl").read_text().splitlines()
    (world / "mood" / "test.jsonl").write_text(lines[0].replace("}", ', "label": 0}') + "\n")
    shutil.copy(world / "mood" / "calibration.jsonl", world / "colour" / "calibration.jsonl")
    (world / "animal" / "calibration.jsonl").write_text(lines[0])
    path = world / "experts" / "mood" / "model.safetensors"
    save_file({**load_file(path), "classifier.weight": torch.zeros(2, 32)}, path, {"format": "pt"})
    (world / "experts" / "mood" / "chat_template.jinja").write_text("{{ messages }}")
    text = found(world, replace(merge, ignore=["classifier.*"]))
    assert "mood: 1 of 1 test examples are also calibration examples" in text
    assert "mood and colour have the same calibration examples" in text
    assert "animal: 1 calibration examples" in text
    assert "mood: classifier.weight are not in the base" in text
    assert "mood: its chat template differs from the base's" in text
    gone = replace(merge.experts["animal"], calibration=str(world / "gone.jsonl"))
    none = replace(merge.experts["colour"], calibration=None)
    text = found(world, replace(merge, experts={"animal": gone, "colour": none}))
    assert "error: animal: " in text
    assert "no such file" in text
    assert "error: colour: no calibration examples to learn from" in text


def test_label_texts_that_a_fit_refuses_are_an_error(world: Path) -> None:
    (world / "mood" / "labels.json").write_text(json.dumps({"0": "good", "1": "bad"}))
    said = found(world, recipe(world))
    assert f"error: recipe.experts.mood.head: {world}/mood/labels.json: needs a list of at least two" in said


def refused(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What inspect prints, on one line, of a configuration that a fit refuses; --output has it too."""
    output = file.with_suffix(".json")
    assert main(["inspect", str(file), "--weights", "no", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"\d+ errors?, listed above", printed.err)
    assert "plan of memory" not in printed.out
    errors = [f["what"] for f in json.loads(output.read_text())["findings"] if f["level"] == "error"]
    said = " ".join(printed.out.split())
    assert all(" ".join(error.split()) in said for error in errors)
    return said


def test_what_a_fit_refuses_is_an_error(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = recipe(world)
    experts = {name: replace(expert, head=None) for name, expert in merge.experts.items()}
    write_recipe(replace(merge, experts=experts), "recipe", world / "headless.yaml")
    said = refused(world / "headless.yaml", capsys)
    assert "has no output layer, and ['mood', 'colour', 'animal'] no `head`" in said


def configured(place: Path, merge: Recipe, **sections: object) -> Path:
    """A configuration of a fit."""
    write_recipe(merge, "recipe", place / "config.yaml")
    with (place / "config.yaml").open("a") as file:
        file.write(yaml.safe_dump({"trainer": {"max_steps": 2}, **sections}))
    return place / "config.yaml"


def test_texts_longer_than_the_models_positions_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = languages_recipe(write_languages(tmp_path))
    (tmp_path / "b.jsonl").write_text((json.dumps({"text": "good cat " * 30}) + "\n") * 8)
    file = configured(tmp_path, merge, data={"batch_size": 1, "max_length": 48})
    said = refused(file, capsys)
    assert re.search(r"b\.jsonl: an example of 48 tokens is over the model's limit of 32 positions", said)
    assert "set data.max_length to 32 or less" in said
    file = configured(tmp_path, merge, data={"batch_size": 1, "max_length": 32})
    assert main(["inspect", str(file), "--weights", "no"]) == 0
    assert "peak" in capsys.readouterr().out


def test_a_schedule_that_a_fit_refuses_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plateau = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}
    merge = languages_recipe(write_languages(tmp_path))
    file = configured(tmp_path, merge, model={"lr_scheduler": plateau}, data={"max_length": 16})
    assert "ReduceLROnPlateau waits for a measure" in refused(file, capsys)


@pytest.mark.parametrize("kind", ["CNN", "WordWeights"])
def test_odd_modules_are_said_by_inspect_plan_and_fit_in_one_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = write_embedders(tmp_path, ("Transformer", "Pooling", kind, "Normalize"))
    merge = replace(merge, experts={n: replace(e, test=None) for n, e in merge.experts.items()})
    sentence = (
        f"{tmp_path / 'base' / 'modules.json'}: modules that are not supported: {kind}; supported are "
        "Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout. Learn by Alignment, which reads none "
        "of them"
    )
    similarity = {"objective": {"class_path": "trainmerge.Similarity"}}
    file = configured(tmp_path, merge, model=similarity, data={"batch_size": 2, "max_length": 16})
    assert f"{sentence}" in refused(file, capsys)
    assert main(["fit", str(file), str(tmp_path / "run")]) == 1
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=re.escape(sentence)):
        main(["plan", str(tmp_path / "base"), "2", "--length", "8"])  # which needs an output layer
    aligned = {
        "objective": {"class_path": "trainmerge.Alignment", "init_args": {"logits": 0.0, "hidden": 1.0}}
    }
    file = configured(tmp_path, merge, model=aligned, data={"batch_size": 2, "max_length": 16})
    capsys.readouterr()
    assert main(["inspect", str(file), "--weights", "no"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert sentence in said
    assert "a: " in said
    assert "peak" in said


def test_the_suggestion_and_its_commands_run_as_printed(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two full experts and a LoRA: OptMerge at its native coefficient, stopped by held-out examples."""
    monkeypatch.chdir(world)
    write_config(world)
    ask = ["inspect", "config.yaml", "--suggest", "my suggestion.yaml", "--out", "my merge"]
    assert main(ask) == 0
    printed = capsys.readouterr().out
    assert "peak per device" in printed  # the plan
    text = Path("my suggestion.yaml").read_text()
    assert "# recipe.preprocess: full experts" in text
    settings = yaml.safe_load(text)
    assert settings["recipe"]["preprocess"][0]["class_path"] == "trainmerge.OptMerge"
    assert settings["model"]["initial"] == 1.0
    assert settings["data"]["held_out"] == 0.2
    assert main(ask) == 1
    assert "already exists" in capsys.readouterr().err
    commands = re.findall(r"trainmerge (?:fit|export) [^&\n]+", printed)
    assert [line.split()[1] for line in commands] == ["fit", "export", "fit"]
    for line in commands:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = shlex.split(line)[1:]
            assert main([*given, "--report", "false"] if given[0] == "fit" else given) == 0, line
    assert Path("my merge/model.safetensors").is_file()
    assert "StopOnHeldOut" in Path("runs/first/config.yaml").read_text()


def test_suggest_says_what_auto_would_do(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    write_config(world, recipe__preprocess=[{"class_path": "trainmerge.Slerp"}], model__initial=0.7)
    assert main(["inspect", "config.yaml", "--weights", "no", "--suggest", "a.yaml", "--out", "out"]) == 0
    table = capsys.readouterr().out
    said = " ".join(table.split())
    for name in ("task arithmetic", "layer least squares", "TIES", "TSV-M", "OptMerge", "ASWUDI"):
        assert name in table
    assert "left out: Slerp merges two experts, not 3" in said
    assert "learns by Entropy in 2 fits of at most 3 steps" in said
    assert re.search(r"by the plan at most .+ s, .+ s of it to judge", said)
    assert "let held-out examples choose: trainmerge auto config.yaml out let" not in said
    assert "let held-out examples choose: trainmerge auto config.yaml out instead, the same" in said
    assert "instead, the same without learning: trainmerge auto config.yaml out --learn false" in said
    assert yaml.safe_load(Path("a.yaml").read_text())["model"]["initial"] == 0.7  # for its own preprocessing
    write_config(world, model__constraint={"class_path": "trainmerge.Sigmoid"})
    assert main(["inspect", "config.yaml", "--weights", "no", "--suggest", "b.yaml"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trainmerge auto would refuse config.yaml: auto scales coefficients directly" in said


def test_a_forecast_says_what_a_merge_will_lose(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(world)
    assert main(["inspect", str(config), "--weights", "no", "--forecast", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "encoder.layer.1" in said
    together, apart = (
        int(word) for word in re.findall(r"(\d+)% (?:of the experts' effect|with one per)", said)
    )
    assert 0 < apart <= together <= 100  # three unrelated experts; each layer's own coefficients lose less
    assert main(["inspect", str(world), "--forecast", "4"]) == 1
    assert "name the YAML file" in capsys.readouterr().err
    experts = {n: replace(e, calibration=None) for n, e in recipe(world).experts.items()}
    write_recipe(replace(recipe(world), experts=experts), "recipe", world / "silent.yaml")
    with pytest.raises(ValueError, match=r"reads examples of each expert, and .* have none"):
        forecast_config(world / "silent.yaml")


def test_rules_of_thumb(tmp_path: Path) -> None:
    languages = languages_recipe(write_languages(tmp_path))
    learned = suggest(languages, {"a": 6, "b": 6}, None)
    assert learned.settings["model"]["objective"]["class_path"] == "trainmerge.Alignment"
    assert learned.settings["model"]["initial"] == 1.0
    assert learned.settings["recipe"]["preprocess"][0]["class_path"] == "trainmerge.OptMerge"
    assert "held_out" not in learned.settings["data"]  # too few to hold some out
    adapters = suggest(languages, {"a": 16, "b": 40}, None, low_rank=True)
    assert adapters.settings["recipe"]["preprocess"] == []
    assert adapters.settings["model"]["initial"] == 0.5
    assert adapters.settings["data"]["held_out"] == 0.2
    own = replace(languages, preprocess=[tm.Ties()])
    assert suggest(own, {"a": 6, "b": 6}, None).settings["model"]["initial"] == 0.5
    kept = suggest(own, {"a": 6, "b": 6}, None, initial=0.8).settings
    assert (kept["model"]["initial"], kept["recipe"]["preprocess"]) == (0.8, [to_config(tm.Ties())])
    assert suggest(languages, {"a": 2, "b": 6}, None).settings["recipe"]["grouping"]["granularity"] == "block"
    closed = suggest(languages, {"a": 6}, None)
    assert closed.settings["trainer"]["max_steps"] == 0
    assert closed.settings["recipe"]["preprocess"] == [to_config(tm.OptMerge())]
    closed = suggest(languages, {"a": 6}, None, low_rank=True)
    assert closed.settings["recipe"]["preprocess"] == [to_config(tm.Tsv())]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2)])
def test_changes_of_products_are_the_dense_ones(heads: int, shared: int) -> None:
    dice = torch.Generator().manual_seed(0)
    d, D = 3, 10

    def random(rows: int) -> torch.Tensor:
        return torch.randn(rows, D, generator=dice, dtype=torch.float64)

    q, k = random(heads * d), random(shared * d)
    q_after, k_after = q + 0.1 * random(heads * d), k + 0.1 * random(shared * d)

    def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        several = right.reshape(shared, d, D).repeat_interleave(heads // shared, 0)
        return left.reshape(heads, d, D).mT @ several

    before, after = products(q, k), products(q_after, k_after)
    _, product = changes(q, k, q_after, k_after, heads, shared)
    assert product == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-9)
    gauge = torch.linalg.qr(torch.randn(d, d, generator=dice, dtype=torch.float64))[0] * 2
    moved = (gauge @ q.reshape(heads, d, D)).reshape(-1, D)
    back = (gauge.inverse().T @ k.reshape(shared, d, D)).reshape(-1, D)
    factors, product = changes(q, k, moved, back, heads, shared)
    assert factors > 0.5
    assert product < 1e-6


def test_embedders_are_suggested_to_match_similarities(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    found = suggest(recipe, {"a": 12, "b": 12}, None)
    assert found.settings["model"]["objective"] == {"class_path": "trainmerge.Similarity"}
    assert found.settings["data"]["batch_size"] == 12
    assert "modules.json" in found.reasons["model.objective"]
