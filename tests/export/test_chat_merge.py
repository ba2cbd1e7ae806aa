"""Two chat experts of a plain base, merged by the command line: the merge answers and stops as they do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import trainmerge as tm
from tests.chat_world import ADDED, ANSWERS, TEMPLATE, answer, chat_recipe, write_chat_world
from tests.export.test_card import check_card
from trainmerge.cli import main
from trainmerge.fitting.reopen import reopen
from trainmerge.run.encoding import check_encoding
from trainmerge.run.folder import RunFolder

CONFIG = {
    "recipe": {
        "base": "base",
        "tokenizer": "union",
        "experts": {name: {"path": name, "calibration": f"{name}.jsonl"} for name in ADDED},
    },
    "model": {
        "objective": "trainmerge.Alignment",
        "initial": 0.5,
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.03}},
    },
    "data": {"batch_size": 4, "max_length": 32, "columns": {"text": None, "messages": "messages"}},
    "trainer": {"max_steps": 50, "accelerator": "cpu", "enable_progress_bar": False},
    "report": False,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `run`, and its export, verified, in `out`."""
    return fitted(tmp_path_factory.mktemp("chat"), tied=False)


def fitted(root: Path, tied: bool) -> Path:
    write_chat_world(root, tied)
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["fit", "config.yaml", "run"]) == 0
        assert main(["export", "run", "out", "--verify"]) == 0
    return root


@pytest.fixture
def _inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


inside = pytest.mark.usefixtures("_inside")


def says(root: Path, folder: str) -> list[str]:
    return [answer(root / folder, question) for answers in ANSWERS.values() for question in answers]


WANTED = [f"{words} <|end|>" for answers in ANSWERS.values() for words in answers.values()]


@inside
def test_it_answers_and_stops_like_its_experts(world: Path) -> None:
    assert says(world, "a")[:4] + says(world, "b")[4:] == WANTED
    assert says(world, "out") == WANTED


def test_tied_embeddings_too(tmp_path: Path) -> None:
    root = fitted(tmp_path, tied=True)
    assert says(root, "a")[:4] + says(root, "b")[4:] == WANTED
    assert says(root, "out") == WANTED
    assert "lm_head.weight" not in load_file(root / "out/model.safetensors")


@inside
def test_the_exports_tokenizer_template_and_ends() -> None:
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "<|end|>")
    for file in ("config.json", "generation_config.json"):
        assert json.loads(Path("out", file).read_text())["eos_token_id"] == tokenizer.eos_token_id


@inside
def test_its_card_is_in_the_hubs_schema_and_rebuilds_it(tmp_path: Path) -> None:
    check_card(Path("out/README.md").read_text())
    card = shutil.copy("out/README.md", tmp_path / "README.md")
    assert main(["rebuild", str(card), str(tmp_path / "again")]) == 0
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == Path("out", file).read_bytes(), file


@inside
def test_a_run_is_scored_and_so_is_its_export(tmp_path: Path) -> None:
    lines = [{"text": "<|user|> good <|end|> <|assistant|> red blue <|end|>"}]
    Path("test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experts = {name: tm.Expert(name, f"{name}.jsonl", "test.jsonl") for name in ADDED}
    recipe = tm.Recipe("base", experts, tokenizer="union", held_out={"plain": tm.HeldOut("test.jsonl")})
    module = tm.MergeModule(recipe, initial=1.0, workspace=str(tmp_path / "run/workspace"))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, "base"), trainer, tmp_path / "run")
    out = tm.export_run(tmp_path / "run", tmp_path / "exported")
    run = tm.evaluate_run(tmp_path / "run", max_length=32)
    exported = tm.evaluate_checkpoint(out, recipe, max_length=32)
    assert exported.rows[str(out)]["a"].score == pytest.approx(run.rows["learned"]["a"].score, rel=1e-5)
    assert exported.rows["base"]["plain"].score == pytest.approx(run.rows["base"]["plain"].score, rel=1e-5)
    with pytest.raises(ValueError, match="its token ids are not those of the recipe's merge"):
        tm.evaluate_checkpoint("b", recipe, max_length=32)


@inside
def test_a_finished_run_resumes_and_opens_where_it_moved(tmp_path: Path) -> None:
    before = RunFolder(Path("run")).coefficients.read_bytes()
    assert main(["fit", "config.yaml", "run", "--trainer.max_steps", "51"]) == 0
    assert RunFolder(Path("run")).coefficients.read_bytes() != before
    shutil.copytree("run", tmp_path / "moved")
    shutil.rmtree(RunFolder(tmp_path / "moved").workspace)
    assert main(["export", str(tmp_path / "moved"), str(tmp_path / "out"), "--verify"]) == 0
    assert main(["export", "run", "out", "--overwrite"]) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_an_export_after_a_change_of_generation_config_takes_the_new_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    monkeypatch.chdir(root)
    (root / "base/generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    with pytest.warns(UserWarning, match="temperature is None, the base has 0.5"):
        out = tm.export_run("run", "again")
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    assert (out / "model.safetensors").read_bytes() == (root / "out/model.safetensors").read_bytes()


@inside
def test_a_finished_run_gives_its_module_and_data_again() -> None:
    module, data = reopen(RunFolder(Path("run")))
    assert Path(data.tokenizer) == module.opened.base.path
    module.load(data)
    assert len(module.loaded.teachers) == len(ADDED)


@inside
def test_inspect_knows_the_merges_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "config.yaml"]) == 0
    assert "template differs" not in capsys.readouterr().out


@inside
def test_an_export_that_reads_the_chats_otherwise_is_refused(tmp_path: Path) -> None:
    run, recipe = RunFolder(Path("run")), chat_recipe(Path())
    assert check_encoding(run, recipe, Path("out"), Path("out")) == 8
    other = Path(shutil.copytree("out", tmp_path / "other"))
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|user|>"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"encodes a calibration chat of a otherwise .* in '<.user.> good"):
        check_encoding(run, recipe, Path("out"), other)
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "<|tool|>"))
    with pytest.raises(ValueError, match="its chat template writes a calibration chat of a as"):
        check_encoding(run, recipe, Path("out"), other)


@inside
def test_a_fit_in_python_needs_the_merges_tokenizer(tmp_path: Path) -> None:
    recipe = chat_recipe(Path())
    module = tm.MergeModule(recipe, workspace=str(tmp_path / "run/workspace"))
    columns = tm.Columns(text=None, messages="messages")
    files = {name: f"{name}.jsonl" for name in ADDED}
    words = recipe.tokenizer_folder(tmp_path / "elsewhere")
    data = tm.Calibration(files, words, columns=columns, max_length=32)
    with pytest.raises(ValueError, match="the recipe chooses another for the merge: set it to"):
        module.load(data)
    with pytest.raises(ValueError, match=r"no chat template; .* set recipe.chat_template"):
        tm.Calibration(files, "base", columns=columns)


@inside
def test_mergekits_union_is_the_same_merge(tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ADDED]
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": models,
        "tokenizer_source": "union",
    }
    (tmp_path / "m.yml").write_text(yaml.safe_dump(content))
    tm.merge_file(tmp_path / "m.yml", tmp_path / "out")
    module = tm.MergeModule(chat_recipe(Path()), initial=0.5, workspace=str(tmp_path / "run/workspace"))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, "base"), trainer, tmp_path / "run")
    tm.export_run(tmp_path / "run", tmp_path / "exported")
    got, want = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "exported"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        tmp_path / "exported/tokenizer.json"
    ).read_bytes()
    tm.to_mergekit(tmp_path / "run", tmp_path / "back.yml")
    assert yaml.safe_load((tmp_path / "back.yml").read_text())["tokenizer_source"] == "union"


@inside
@pytest.mark.parametrize("tokenizer", ["union", "b"])
def test_rows_of_tokens_are_written_for_mergekit_too(tmp_path: Path, tokenizer: str) -> None:
    rows = {"<|end|>": tm.TokenRow("b", force=True), "red": tm.TokenRow("a", "blue", force=True)}
    rows |= {"good": tm.TokenRow(None, force=True), "<|tool|>": tm.TokenRow("base", 3)}
    recipe = chat_recipe(Path(), tokenizer=tokenizer, tokens=rows, pad_to_multiple=16)
    module = tm.MergeModule(recipe, initial=0.5, workspace=str(tmp_path / "run/workspace"))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, "base"), trainer, tmp_path / "run")
    want = load_file(tm.export_run(tmp_path / "run", tmp_path / "exported") / "model.safetensors")
    tm.to_mergekit(tmp_path / "run", tmp_path / "back.yml")
    got = load_file(tm.merge_file(tmp_path / "back.yml", tmp_path / "out") / "model.safetensors")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)
    assert main(["rebuild", str(tmp_path / "exported"), str(tmp_path / "again")]) == 0
