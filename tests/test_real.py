"""The main job on the real thing: MiniLM-L6, committed LoRA experts, real texts. `make data` fetches them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from tests.opening import open_task_vectors
from trainmerge.checkpoints import load_model, open_checkpoint
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.model.merged_model import MergedModel

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[1]
BASE = ROOT / "data" / "cache" / "models" / "minilm-l6"
EXPERTS = ROOT / "data" / "experts"


@pytest.fixture(scope="module", autouse=True)
def fetched() -> None:
    if not BASE.is_dir():
        pytest.fail(
            "the base model is not there: run `make data`, or leave these tests out with -m 'not real'"
        )


def test_committed_adapters_are_what_their_checksums_say() -> None:
    for line in (EXPERTS / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((EXPERTS / name.removeprefix("*")).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("name", ["movie", "r8"])
def test_an_expert_at_coefficient_one_is_pefts_merge(name: str) -> None:
    base = open_checkpoint(BASE)
    vectors = open_task_vectors(base, {name: EXPERTS / name})
    merged = load_model(base).module
    MergedModel(merged, vectors, Coefficients([name], Grouping().layout(vectors.shapes), 1.0)).materialise()
    expert = (
        PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), EXPERTS / name).merge_and_unload().eval()
    )
    inputs = AutoTokenizer.from_pretrained(BASE)(
        ["a moving film", "oil prices rose"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        got, want = merged(**inputs).last_hidden_state, expert(**inputs).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_demo_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run, out = str(tmp_path / "run"), str(tmp_path / "merged")
    small = ["--data.batch_size=2", "--data.max_examples=4", "--data.max_length=32"]
    for steps in ("1", "2"):
        fit = [
            "fit",
            "--config",
            "configs/demo.yaml",
            "--run",
            run,
            "--report=false",
            f"--trainer.max_steps={steps}",
        ]
        assert main([*fit, *small]) == 0
    assert main(["export", run, out, "--verify"]) == 0
    assert AutoModel.from_pretrained(out) is not None
    assert main(["evaluate", run, "--limit", "20", "--compare", "false"]) == 0
    learned = json.loads((tmp_path / "run" / "scores.json").read_text())["learned"]
    assert 0.5 < learned["mean"] <= 1.0  # 20-class news among the tasks: far from chance
