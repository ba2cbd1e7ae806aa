"""The cards of what people publish: the demo, a merge of LoRA experts, and its adapters.

The demo is its own configuration and commands, on three tiny encoders and two steps; `test_card` has resumed
runs, and `test_chat_merge` the card of a chat merge.
"""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import trainmerge as tm
from tests.export.test_card import check_card
from tests.export.test_export_adapter import world  # noqa: F401 - a fixture
from tests.hub_stand_in import use
from tests.world import LABELS, write_world
from trainmerge.cli import main

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


def write_demo(root: Path) -> Path:
    """The demo's configuration, for the experts of a tiny world under its own folders."""
    write_world(root)
    content = yaml.safe_load(DEMO.read_text())
    recipe = content["recipe"]
    recipe["base"], recipe["experts"] = "base", list(LABELS)
    recipe["each"] = {
        "path": "experts/{name}", "calibration": "{name}/calibration.jsonl", "test": "{name}/test.jsonl",
        "head": {"class_path": "trainmerge.LabelHead", "init_args": {"labels": "{name}/labels.json"}},
    }  # fmt: skip
    (root / "demo.yaml").write_text(yaml.safe_dump(content))
    return root


def test_the_card_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_demo(tmp_path))
    for words in (
        ["fit", "demo.yaml", "runs/demo", "--no-report", "--trainer.max-steps", "2"],
        ["evaluate", "runs/demo", "--limit", "4", "--no-compare"],
        ["export", "runs/demo", "runs/demo/merged"],
    ):
        assert main(words) == 0
    text = Path("runs/demo/merged/README.md").read_text()
    head = check_card(text)
    assert {key: head[key] for key in ("library_name", "pipeline_tag", "tags")} == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["merge", "trainmerge"],
    }
    (entry,) = head["model-index"]
    assert [result["dataset"]["name"] for result in entry["results"]] == list(LABELS)
    assert "in 2 steps" in text
    assert "torch.optim.Adam" in text
    assert str(tmp_path) not in text


@pytest.mark.usefixtures("inside")
def test_the_cards_of_a_merge_of_lora_experts(world: Path, tmp_path: Path) -> None:  # noqa: F811
    head = check_card((world / "merged" / "README.md").read_text())
    assert head["base_model"] == ["org/base", "org/a", "org/b"]
    assert head["base_model_relation"] == "merge"
    tm.export_adapter(world / "runs" / "lora", tmp_path / "each", tm.AdapterForm(each=True))
    for folder, ids in ((world / "adapter", "org/base"), (tmp_path / "each", None)):
        text = (folder / "README.md").read_text()
        head = check_card(text)
        assert (head.get("base_model"), head["library_name"]) == (ids, "peft")
        assert ModelCard(text).data.base_model == ids


@pytest.fixture
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    use(monkeypatch, world / "cache")
