"""mergekit's files and merges in one line with models by their ids on the hub, and the card that they get."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import trainmerge as tm
from tests.export.test_card import check_card
from tests.hub_stand_in import COMMIT, use, write_cache
from tests.world import llama, nudge, write_languages
from trainmerge.cli import main

LICENCES = {"base": "apache-2.0", "a": "mit", "b": "mit"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    write_languages(place)
    adapter = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    nudge(adapter, 7)
    adapter.save_pretrained(place / "lora")
    for name in ("base", "a", "b", "lora"):
        licence = f"license: {LICENCES[name]}\n" if name in LICENCES else ""
        (place / name / "README.md").write_text(f"---\n{licence}datasets: [org/{name}-texts]\n---\n")
        write_cache(place / "cache", f"org/{name}", place / name)
    return place


@pytest.fixture(autouse=True)
def inside(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder than that of the models, so that ids are no paths."""
    use(monkeypatch, root / "cache")
    monkeypatch.chdir(tmp_path)


def assert_equal(one: Path, other: Path) -> None:
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def file_of(root: str, revision: str = "") -> dict[str, object]:
    names = [f"{root}a", f"{root}base{revision}+{root}lora"]
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    base = f"{root}base{revision}"
    return {"merge_method": "task_arithmetic", "base_model": base, "models": models, "chat_template": "auto"}


def test_a_file_with_ids_merges_as_one_with_folders(root: Path, tmp_path: Path) -> None:
    for name, content in (("ids", file_of("org/", f"@{COMMIT}")), ("folders", file_of(f"{root}/"))):
        Path(f"{name}.yml").write_text(yaml.safe_dump(content))
        assert main(["merge", f"{name}.yml", name]) == 0
    assert_equal(tmp_path / "ids", tmp_path / "folders")
    text = Path("ids/README.md").read_text()
    head = check_card(text)
    assert head["base_model"] == ["org/base", "org/a", "org/lora"]
    assert (head["license"], head["license_name"]) == ("other", "several")
    assert head["datasets"] == ["org/a-texts", "org/lora-texts"]
    assert head["pipeline_tag"] == "text-generation"
    assert "`apache-2.0` (org/base" in text
    assert yaml.safe_load(Path("ids/mergekit_config.yml").read_text()) == file_of("org/", f"@{COMMIT}")
    shown = text + Path("folders/README.md").read_text()
    assert str(root) not in shown.replace("\\", "")  # markdown escapes parts of a path
    check_card(Path("folders/README.md").read_text())


def test_one_line_with_ids(root: Path, tmp_path: Path) -> None:
    words = ["merge", "org/base", "org/a", "org/b", "--weight", "0.5", "-o"]
    assert main([*words, "ids", "--tokenizer", "org/base"]) == 0
    tm.merge_models(root / "base", [root / "a", root / "b"], "folders", weight=0.5)
    assert_equal(tmp_path / "ids", tmp_path / "folders")
    head = check_card(Path("ids/README.md").read_text())
    assert head["base_model"] == ["org/base", "org/a", "org/b"]


def test_an_id_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "org/base", "org/none", "-o", "out"]) == 1
    assert "no org/none in the hub's cache" in capsys.readouterr().err
    assert not Path("out").exists()
