"""Calibration texts that experts write themselves: sampled once, kept, and read as any file."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.chat_world import ANSWERS, write_chat_world
from tests.world import WORDS, languages_recipe, recipe, write_languages, write_world
from trainmerge.auto import auto, search
from trainmerge.auto.starts import Start
from trainmerge.cli import main
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.plan_fit import plan_fit
from trainmerge.fitting.reopen import reopen
from trainmerge.model.written_texts import Writer
from trainmerge.plan.devices import device_named
from trainmerge.run.config import to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.generated_texts import GENERATED

COUNT = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model whose two experts write their own texts."""
    root = write_languages(tmp_path_factory.mktemp("languages"))
    each = {"path": f"{root}/{{name}}", "calibration": {"generate": COUNT, "length": 6}}
    config = {
        "recipe": {"base": str(root / "base"), "each": each, "experts": ["a", "b"]},
        "model": {"objective": {"class_path": "trainmerge.Alignment"}},
        "data": {"batch_size": 2, "max_length": 16},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False},
        "report": False,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def run(world: Path) -> RunFolder:
    folder = RunFolder(world / "run")
    assert main(["fit", str(world / "config.yaml"), str(folder.path)]) == 0
    return folder


def texts(folder: RunFolder, name: str) -> list[str]:
    (file,) = folder.workspace.glob(f"{GENERATED}{name}-*.jsonl")
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_each_expert_writes_its_own(world: Path, run: RunFolder) -> None:
    """The same texts as the expert alone writes, in its own model."""
    wanted = tm.Generate(COUNT, length=6)
    for name in "ab":
        module = AutoModelForCausalLM.from_pretrained(world / name).eval()
        alone = Writer(module, Tokenizer(str(world / "base"), 16), wanted, tm.Columns(), f"0 {name}")
        assert texts(run, name) == [row["text"] for row in alone.rows()]
        assert len({*texts(run, name)}) > COUNT // 2
        assert all(text.split() and {*text.split()} <= {*WORDS} for text in texts(run, name))
    assert texts(run, "a") != texts(run, "b")


def test_they_are_kept_and_a_run_reopened_reads_them(run: RunFolder) -> None:
    stamps = {file: file.stat().st_mtime_ns for file in run.workspace.glob(f"{GENERATED}*")}
    module, data = reopen(run)
    assert [*data.unwritten] == ["a", "b"]
    module.load(data)
    assert not data.unwritten
    assert [[example.text for example in own] for own in data.examples] == [texts(run, n) for n in "ab"]
    assert {file: file.stat().st_mtime_ns for file in run.workspace.glob(f"{GENERATED}*")} == stamps


def test_a_fit_of_them_resumes(world: Path, run: RunFolder, tmp_path: Path) -> None:
    """Two steps and one more are three."""
    config, other = str(world / "config.yaml"), RunFolder(tmp_path / "run")
    assert main(["fit", config, str(other.path), "--trainer.max_steps=2"]) == 0
    assert main(["fit", config, str(other.path)]) == 0
    assert other.coefficients.read_bytes() == run.coefficients.read_bytes()


def test_a_resume_compares_the_texts(
    world: Path, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their SHA-256 in the manifest, also after the workspace was lost, and in a snapshot."""
    config, other = str(world / "config.yaml"), RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    files = {name: next(other.workspace.glob(f"{GENERATED}{name}-*.jsonl")) for name in "ab"}
    told = {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert other.read_manifest()["generated"] == told
    shutil.rmtree(other.workspace)  # the same processor writes the same texts again
    assert main(["fit", config, str(other.path), "--trainer.max_steps=4"]) == 0
    lines = files["b"].read_text().splitlines()
    files["b"].write_text("\n".join(reversed(lines)) + "\n")  # as another processor's might differ
    capsys.readouterr()
    assert main(["fit", config, str(other.path), "--trainer.max_steps=5"]) != 0
    said = capsys.readouterr().err
    assert "learned from other texts" in said
    assert "generated.b" in said
    assert "generated.a" not in said
    elsewhere = ["fit", config, str(tmp_path / "elsewhere"), f"--resume={other.latest()}"]
    workspace = RunFolder(tmp_path / "elsewhere").workspace
    workspace.mkdir(parents=True)
    for file in files.values():
        shutil.copy(file, workspace)
    assert main([*elsewhere, "--trainer.max_steps=5"]) != 0
    assert "learned from other texts" in capsys.readouterr().err


def test_other_settings_are_another_run(
    world: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = yaml.safe_load((world / "config.yaml").read_text())
    changed["recipe"]["each"]["calibration"]["temperature"] = 0.5
    (world / "changed.yaml").write_text(yaml.safe_dump(changed))
    assert main(["fit", str(world / "changed.yaml"), str(run.path)]) != 0
    assert "temperature" in capsys.readouterr().err


def test_beginnings_come_from_a_file(world: Path) -> None:
    (world / "begin.txt").write_text("good cat\nred\n")
    wanted = tm.Generate(4, length=3, prefixes=str(world / "begin.txt"))
    module = AutoModelForCausalLM.from_pretrained(world / "a").eval()
    rows = Writer(module, Tokenizer(str(world / "base"), 16), wanted, tm.Columns(), "").rows()
    assert [
        row["text"].startswith(begun) for row, begun in zip(rows, ["good cat", "red"] * 2, strict=True)
    ] == [True] * 4


def test_a_plan_and_an_inspection_write_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, device = from_config(world / "config.yaml", world / "planned"), device_named("h100")
    files = {n: str(world / f"{n}.jsonl") for n in "ab"}
    known = tm.Calibration(files, str(world / "base"), batch_size=2, max_length=6)  # six tokens each
    plan = plan_fit(settings.module, settings.data, device=device)
    assert plan.dry_run == plan_fit(settings.module, known, device=device).dry_run
    assert not (world / "planned").exists()
    tm.inspect_path(world / "config.yaml", weights="no", output=world / "found.json")
    assert json.loads((world / "found.json").read_text())["examples"] == {"a": COUNT, "b": COUNT}
    assert f"{COUNT} texts of its own" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the best merge is further")
def test_auto_writes_them_once(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "starts", lambda *_: [Start("task arithmetic", scales=(0.3,))])
    monkeypatch.setattr(auto, "write_report", lambda _: None)
    choice = tm.auto_config(world / "config.yaml", world / "merged")
    assert capsys.readouterr().out.count(f"writes {COUNT} texts") == 2
    assert texts(RunFolder(next(iter(choice.learned.values()))), "a") == texts(
        RunFolder(world / "merged-auto/judging"), "a"
    )


def test_a_chat_expert_asks_and_answers(tmp_path: Path) -> None:
    """Its own questions; and to those that it was trained on, its answers."""
    root = write_chat_world(tmp_path)
    (root / "questions.txt").write_text("\n".join(ANSWERS["a"]))
    module = AutoModelForCausalLM.from_pretrained(root / "a").eval()
    tokenize, columns = Tokenizer(str(root / "a"), 24), tm.Columns(messages="chat")

    def pairs(wanted: tm.Generate) -> list[tuple[str, str]]:
        chats = [row["chat"] for row in Writer(module, tokenize, wanted, columns, "").rows()]
        assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in chats)
        return [(turns[0]["content"], turns[1]["content"]) for turns in chats]

    free = pairs(tm.Generate(8, length=8))
    assert all({*question.split(), *answer.split()} <= {*WORDS} for question, answer in free)
    asked = tm.Generate(4, length=8, temperature=0.01, prefixes=str(root / "questions.txt"))
    assert dict(pairs(asked)) == ANSWERS["a"]


def test_who_cannot_write_is_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path)
    given = recipe(tmp_path)
    changed = {n: replace(e, calibration=tm.Generate(4)) for n, e in given.experts.items()}
    content = {
        "recipe": to_config(replace(given, experts=changed)),
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    for words in (["fit", "config.yaml", "run"], ["inspect", "config.yaml"]):
        assert main([words[0], *(str(tmp_path / word) for word in words[1:])]) != 0
        said = "".join(capsys.readouterr())
        assert "recipe.experts.mood.calibration" in said
        assert "writes no texts" in said
        assert "wikitext" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("columns", "words"), [({"spans": "spans"}, "leave them out"), ({}, "no such file")])
def test_what_cannot_be_written_is_refused(world: Path, columns: dict[str, Any], words: str) -> None:
    given = languages_recipe(world)
    wanted = tm.Generate(2, prefixes=None if columns else str(world / "absent.txt"))
    experts = {n: replace(e, calibration=wanted) for n, e in given.experts.items()}
    merge = replace(given, experts=experts)
    module = tm.MergeModule(merge, tm.Alignment(), workspace=str(world / "refused"))
    data = tm.Calibration(
        dict.fromkeys("ab", wanted), merge.base, columns=tm.Columns(**columns), max_length=16
    )
    trainer = tm.make_trainer(world / "refused", max_steps=1, accelerator="cpu")
    with pytest.raises(ValueError, match=words):
        tm.fit(module, data, trainer, world / "refused")
