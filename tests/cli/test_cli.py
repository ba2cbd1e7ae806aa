"""The command line end to end, and every bad input as one clear error with nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.world import LABELS, write_world
from trainmerge.cli import main


def write_config(root: Path, **changes: object) -> Path:
    experts = {
        task: {
            "path": str(root / "experts" / task),
            "calibration": str(root / task / "calibration.jsonl"),
            "test": str(root / task / "test.jsonl"),
            "head": {
                "class_path": "trainmerge.LabelHead",
                "init_args": {"labels": str(root / task / "labels.json")},
            },
        }
        for task in LABELS
    }
    config = {
        "recipe": {"base": str(root / "base"), "experts": experts},
        "model": {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}},
        "data": {"batch_size": 4, "max_length": 16},
        "trainer": {"accelerator": "cpu", "max_steps": 3},
        "report": False,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_presets_and_informed_methods_from_yaml(world: Path) -> None:
    config = str(
        write_config(
            world,
            recipe__preprocess=[{"class_path": "trainmerge.RegMean", "init_args": {"sequential": True}}],
            model__initial={
                "class_path": "trainmerge.LayerSwap",
                "init_args": {"outer": "mood", "inner": "colour", "bottom": 1, "top": 0, "transition": 0},
            },
            model__subspace=4,
            model__weights="bfloat16",
        )
    )
    run, out = str(world / "run"), str(world / "merged")
    assert main(["fit", "--config", config, "--run", str(world / "still"), "--trainer.max_steps", "0"]) == 0
    assert main(["export", str(world / "still"), out]) == 0
    assert main(["fit", "--config", config, "--run", run]) == 0
    assert main(["fit", "--config", config, "--run", run, "--trainer.max_steps", "5"]) == 0
    assert main(["export", run, out, "--overwrite", "true"]) == 0
    assert main(["evaluate", run, "--max_length", "16", "--compare", "false"]) == 0
    values = load_file(world / "still" / "coefficients.safetensors")["coefficients"]
    assert set(values.flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(values, load_file(world / "run" / "coefficients.safetensors")["coefficients"])


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path)
    return tmp_path


def test_fit_resume_export_evaluate_inspect(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run, out = str(write_config(world)), str(world / "run"), str(world / "merged")
    assert main(["fit", "--config", config, "--run", run]) == 0
    assert main(["fit", "--config", config, "--run", run, "--trainer.max_steps", "5"]) == 0
    steps = [json.loads(line)["step"] for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    resolved = yaml.safe_load((world / "run" / "config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 5
    assert main(["inspect", run]) == 0
    assert main(["export", run, out]) == 0
    assert AutoModel.from_pretrained(out) is not None
    assert main(["evaluate", run, "--max_length", "16"]) == 0
    scores = json.loads((world / "run" / "scores.json").read_text())
    assert {"base", "average", "learned", "expert"} < scores.keys()
    assert scores["expert"]["normalised"] == 1.0
    capsys.readouterr()
    assert main(["evaluate", out, "--max_length", "16"]) == 1
    assert "--recipe RUN" in capsys.readouterr().err  # an export holds no path of the machine
    words = ["evaluate", out, "--recipe", run, "--max_length", "16"]
    assert main([*words, "--output", str(world / "again.json")]) == 0
    (again,) = json.loads((world / "again.json").read_text()).values()
    assert again["mean"] == scores["learned"]["mean"]
    alone = {"recipe": yaml.safe_load((world / "run" / "recipe.yaml").read_text())["recipe"]}
    (world / "bare.yaml").write_text(yaml.safe_dump(alone))
    assert main(["inspect", str(world / "bare.yaml")]) == 0  # everything else has defaults
    assert "peak per device" in capsys.readouterr().out
    (world / "bare.yaml").write_text(yaml.safe_dump(alone | {"model": {"no": 1}}))
    assert main(["inspect", str(world / "bare.yaml")]) == 1
    assert "error: no key 'model.no'" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "coefficients" in capsys.readouterr().out


def test_resume_from_the_folders_own_config(world: Path) -> None:
    run = world / "run"
    assert main(["fit", "--config", str(write_config(world)), "--run", str(run)]) == 0
    assert main(["fit", "--config", str(run / "config.yaml"), "--trainer.max_steps", "4"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def truncate(world: Path) -> None:
    path = world / "experts" / "mood" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard(world: Path) -> dict[str, object]:
    """Make the base sharded; the index, to be spoiled."""
    model = AutoModel.from_pretrained(world / "base")
    (world / "base" / "model.safetensors").unlink()
    model.save_pretrained(world / "base", max_shard_size="20KB")
    index: dict[str, object] = json.loads((world / "base" / "model.safetensors.index.json").read_text())
    return index


def lose_a_shard(world: Path) -> None:
    index = shard(world)
    (world / "base" / max(index["weight_map"].values())).unlink()


def leave_the_folder(world: Path) -> None:
    index = shard(world)
    index["weight_map"]["pooler.dense.bias"] = "../escape.safetensors"
    (world / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(world: Path) -> None:
        path = world / "experts" / "mood" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return spoil


WEIGHT = "encoder.layer.1.output.dense.weight"
lose_a_tensor = change_tensors(lambda tensors: tensors.pop(WEIGHT))
reshape_a_tensor = change_tensors(lambda tensors: tensors.update({WEIGHT: torch.zeros(32, 60)}))
poison = change_tensors(lambda tensors: tensors[WEIGHT][0].fill_(float("inf")))


def only_pickle(world: Path) -> None:
    path = world / "experts" / "mood" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def set_in_expert_config(**values: object) -> Callable[[Path], None]:
    def spoil(world: Path) -> None:
        path = world / "experts" / "mood" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def write_calibration(text: bytes) -> Callable[[Path], None]:
    def spoil(world: Path) -> None:
        (world / "mood" / "calibration.jsonl").write_bytes(text)

    return spoil


def lose_the_labels(world: Path) -> None:
    (world / "mood" / "labels.json").unlink()


def list_an_expert_twice(world: Path) -> None:
    """The copy would win in silence: YAML keeps the last one."""
    config = write_config(world)
    config.write_text(config.read_text().replace("    mood:\n", "    mood: {path: x}\n    mood:\n"))


def run_is_a_file(world: Path) -> None:
    (world / "run").write_text("")


def empty_calibration(world: Path) -> None:
    (world / "colour" / "calibration.jsonl").write_text("")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, ["mood", "model.safetensors"]),
        (lose_a_shard, ["model-00", ".safetensors"]),
        (leave_the_folder, ["index.json", "../escape.safetensors"]),
        (lose_a_tensor, ["mood", WEIGHT]),
        (reshape_a_tensor, ["mood", WEIGHT, "60", "64"]),
        (poison, ["mood", WEIGHT]),
        (only_pickle, ["mood", "pytorch_model.bin", "allow_pickle"]),
        (set_in_expert_config(model_type="roberta"), ["mood", "roberta"]),
        (set_in_expert_config(vocab_size=77), ["mood", "77"]),
        (empty_calibration, ["calibration.jsonl", "empty"]),
        (
            write_calibration(b'{"text": "red"}\n{"text": " "}\n'),
            ["mood/calibration.jsonl", "1 of 2", "number 1"],
        ),
        (write_calibration(b'{"text": "red"}\n{"text": "r\n'), ["mood/calibration.jsonl", "row 1"]),
        (write_calibration(b'{"text": "\xe9"}\n'), ["mood/calibration.jsonl", "UTF-8"]),
        (lose_the_labels, ["mood/labels.json", "no such file"]),
        (list_an_expert_twice, ["config.yaml", "'mood' again", "line"]),
        (run_is_a_file, ["run is not a folder", "choose another one"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_files(
    world: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: list[str]
) -> None:
    config = write_config(world)
    spoil(world)
    capsys.readouterr()  # transformers' own bars
    assert main(["fit", "--config", str(config), "--run", str(world / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trainmerge fit: ")
    assert all(word in error for word in words), error
    assert not (world / "run" / "coefficients.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__columns": {"text": "body"}}, ["calibration.jsonl", "body", "text"]),
        ({"recipe__preproces": []}, ["preproces"]),
        ({"recipe__preprocess": [{"class_path": "trainmerge.Tiess"}]}, ["Tiess"]),
        (
            {"recipe__preprocess": [{"class_path": "trainmerge.Ties", "init_args": {"densty": 0.2}}]},
            ["densty"],
        ),
        ({"model__objective": {"class_path": "trainmerge.Entropi"}}, ["Entropi"]),
        ({"recipe__base": "nowhere"}, ["nowhere: not a folder in ", "paths are relative"]),
        ({"recipe__grouping": {"exclude": ["embedings.*"]}}, ["embedings.*"]),
        ({"model__initial": [0.1, 0.2]}, ["2 values for 3 experts"]),
        ({"trainer__fast_dev_run": True}, ["trainer.fast_dev_run", "max_steps"]),
        ({"trainer__limit_train_batches": 2}, ["trainer.limit_train_batches", "data.max_examples"]),
        ({"trainer__accelerator": "gpu"}, ["gpu"]),
    ],
)
def test_bad_configurations(
    world: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: list[str]
) -> None:
    config = write_config(world, **changes)
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--run", str(world / "run")]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert error.startswith("trainmerge fit: ")  # no list of every option before it
    assert not (world / "run").exists()


def test_an_existing_output_and_a_folder_that_is_no_run(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(world / "base"), str(world / "out")]) == 1
    assert "not a run folder" in capsys.readouterr().err
    main(["fit", "--config", str(write_config(world)), "--run", str(world / "run")])
    shutil.copytree(world / "base", world / "out")
    assert main(["export", str(world / "run"), str(world / "out")]) == 1
    assert "is not an export" in capsys.readouterr().err


def test_a_mistyped_command_is_answered_with_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    assert "did you mean 'export'" in capsys.readouterr().err
    assert main([]) == 2


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, trainmerge.cli.program as cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "trainmerge export runs/first merged/" in done.stdout


def test_config_and_run_are_positional_in_every_spelling(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = str(write_config(world)), str(world / "run")
    assert main(["fit", config, run, "--trainer.max-steps", "1", "--no-report", "--save-every=1"]) == 0
    assert main(["fit", "--model.keep_better", config, run, "--dry-run", "--resume", "auto"]) == 0
    assert main(["fit", "--config", config, "--run", run, "--dry_run", "true"]) == 0
    assert main(["fit", f"{run}/config.yaml", "--trainer.max_steps=2"]) == 0  # its own `run`
    assert len((world / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    for words, named in (
        ([config, run, "--config", config], "'--config' |--config: write"),
        ([config, "--run", run], "--run: write"),
        ([config, run, "more"], "'more' is one word too many"),
    ):
        assert main(["fit", *words]) == 1
        error = capsys.readouterr().err
        assert any(name in error for name in named.split("|")), error
        assert "trainmerge fit CONFIG RUN" in error


def test_a_template_gives_the_same_run(world: Path) -> None:
    plain = write_config(world)
    assert main(["fit", str(plain), str(world / "plain")]) == 0
    config = yaml.safe_load(plain.read_text())
    each = {"path": str(world / "experts" / "{name}"), "test": str(world / "{name}" / "test.jsonl")}
    each |= {"calibration": str(world / "{name}" / "calibration.jsonl")}
    head = {"class_path": "trainmerge.LabelHead", "init_args": {"labels": f"{world}/{{name}}/labels.json"}}
    config["recipe"] |= {"each": {**each, "head": head}, "experts": sorted(LABELS)}
    (world / "short.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", str(world / "short.yaml"), str(world / "short")]) == 0
    for name in ("coefficients.safetensors", "recipe.yaml"):
        assert (world / "plain" / name).read_bytes() == (world / "short" / name).read_bytes()
    assert main(["inspect", str(world / "short.yaml")]) == 0
    each["path"] = "{nam}"
    config["recipe"]["each"] = each
    (world / "short.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", str(world / "short.yaml"), str(world / "other")]) == 1


def test_flags_of_other_commands_work_bare(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run, out = str(write_config(world)), str(world / "run"), str(world / "merged")
    assert main(["fit", config, run]) == 0
    assert main(["export", "--verify", run, out]) == 0
    assert main(["export", run, out, "--overwrite", "--verify", "true"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["evaluate", run, "--no-compare", "--max-length", "16", "--limit", "0"]) == 0
    assert main(["compare", "--limit", "2", run, out, "--max_length=16"]) == 0
    assert main(["inspect", run, "--every", "--weights", "no"]) == 0
    assert main(["pareto", run, "--export", "0"]) == 1
    assert "give both" in capsys.readouterr().err
