"""Checkpoints of one run: their averages, the files that trainers leave, and sharded checkpoints.

Legend: `K` checkpoints.
"""

import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed.checkpoint as dcp
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.world import llama, write_languages, write_tokenizer
from trainmerge.cli import main
from trainmerge.run.checkpoints_of_run import write_merge
from trainmerge.run.config import read_config
from trainmerge.system.sharded_file import ShardedFile

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*pin_memory")
SCHEDULES = ("equal", "cosine", "sqrt", "ema")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [2, 5])
def test_weights_decay_the_updates_of_the_last_stretch(schedule: Any, count: int) -> None:
    """Of any updates g: the average is theta_0 - sum_i w_i g_i with the schedule's w."""
    weights = tm.CheckpointAverage(schedule, decay=0.7).weights(count)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0
    dice = torch.Generator().manual_seed(0)
    updates = [torch.randn(6, dtype=torch.float64, generator=dice) for _ in range(count - 1)]
    points = [torch.zeros(6, dtype=torch.float64)]
    for update in updates:
        points.append(points[-1] - update)
    decay = [sum(weights[i:]) for i in range(1, count)]
    assert all(1 >= before >= after >= 0 for before, after in pairwise(decay))
    average = sum(w * point for w, point in zip(weights, points, strict=True))
    torch.testing.assert_close(average, -sum(w * g for w, g in zip(decay, updates, strict=True)))


def test_schedules_by_their_formulas() -> None:
    assert tm.CheckpointAverage().weights(4) == pytest.approx([0.25] * 4)
    assert tm.CheckpointAverage("ema", 0.5).weights(4) == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2])
    moving = 1.0  # of checkpoints 1, 2, 3
    for point in (2.0, 3.0):
        moving = 0.9 * moving + 0.1 * point
    weights = tm.CheckpointAverage("ema").weights(3)
    assert sum(w * p for w, p in zip(weights, (1, 2, 3), strict=True)) == pytest.approx(moving)
    assert tm.CheckpointAverage("sqrt").weights(4)[0] == pytest.approx(0.5)  # 1 - w_1, w_1 = 1 - sqrt(1 / 4)


def test_the_base_may_be_the_first_checkpoint() -> None:
    layout = tm.Grouping("task").layout({"w": torch.Size([2, 2])})
    later = tm.CheckpointAverage("cosine", from_base=True)(["b", "c"], layout)
    assert later[:, 0].tolist() == pytest.approx(tm.CheckpointAverage("cosine").weights(3)[1:])
    assert tm.CheckpointAverage("cosine")(["b", "c"], layout).sum() == pytest.approx(1)


# --- trainers --------------------------------------------------------------------------------------


def average_of(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    states = [load_file(folder / "model.safetensors") for folder in folders]
    return {n: sum(w * s[n].double() for w, s in zip(weights, states, strict=True)) for n in states[0]}


def assert_merge_is(out: Path, want: dict[str, Tensor]) -> None:
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-5, atol=1e-7)


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 20, (count, 4), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: nn.Module, folder: Path, steps: int, **changes: Any) -> None:
    given = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
        learning_rate=0.01, report_to=[], disable_tqdm=True, save_only_model=True, **changes,
    )  # fmt: skip
    Trainer(model=model, args=given, train_dataset=rows(), callbacks=[tm.MergeCheckpoints(last=3)]).train()


def test_transformers_trainer_leaves_a_mergeable_run(tmp_path: Path) -> None:
    train(llama(), tmp_path / "run", 5, save_total_limit=4)
    content = yaml.safe_load((tmp_path / "run" / "merge.yaml").read_text())["recipe"]
    assert Path(content["base"]).name == "checkpoint-3"
    assert list(content["experts"]) == ["checkpoint-4", "checkpoint-5"]
    write_tokenizer(tmp_path / "run" / "checkpoint-3")
    assert main(["merge", str(tmp_path / "run" / "merge.yaml"), str(tmp_path / "out")]) == 0
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (3, 4, 5)]
    assert_merge_is(tmp_path / "out", average_of(folders, [1 / 3] * 3))


def test_adapters_keep_their_own_base(tmp_path: Path) -> None:
    root = write_languages(tmp_path / "languages")
    base = llama().from_pretrained(root / "base")
    train(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "run", 2)
    content = yaml.safe_load((tmp_path / "run" / "merge.yaml").read_text())
    assert content["recipe"]["base"] == str(root / "base")
    assert list(content["recipe"]["experts"]) == ["checkpoint-1", "checkpoint-2"]
    opened = read_config(tm.Recipe, "recipe", tmp_path / "run" / "merge.yaml").open(tmp_path / "w")
    assert len(opened.task_vectors.deltas) == 2


class Language(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model: PreTrainedModel = llama()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def lightning(callback: pl.Callback, steps: int, **changes: Any) -> None:
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **changes,
    )  # fmt: skip
    trainer.fit(Language(), DataLoader(rows(16), batch_size=2))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightnings_trainer_leaves_a_mergeable_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_tokenizer(tmp_path / "words")
    callback = tm.SaveForMerging(folder, every=1, last=2, schedule="ema")
    lightning(callback, 3, accumulate_grad_batches=2)
    assert sorted(path.name for path in folder.iterdir()) == ["merge.yaml", "step-2", "step-3"]
    for file in (tmp_path / "words").iterdir():
        shutil.copy(file, folder / "step-2")
    assert main(["merge", str(folder / "merge.yaml"), str(tmp_path / "out")]) == 0
    assert_merge_is(tmp_path / "out", average_of([folder / "step-2", folder / "step-3"], [0.9, 0.1]))
    with pytest.raises(ValueError, match=r"step-2 and step-3 are not of this run|step-2, step-3 are not of"):
        lightning(tm.SaveForMerging(folder, every=1), 2)
    lightning(tm.SaveForMerging(tmp_path / "few", every=2), 2, accumulate_grad_batches=2)
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["step-2"]  # the start is none of them
    with pytest.raises(ValueError, match=r"Language\.network has no save_pretrained"):
        lightning(tm.SaveForMerging(folder, every=1, model="network"), 1)


def test_one_checkpoint_is_no_merge(tmp_path: Path) -> None:
    assert write_merge(tmp_path, [tmp_path / "checkpoint-1"]) is None
    assert not list(tmp_path.iterdir())


# --- sharded checkpoints ---------------------------------------------------------------------------


def sharded(folder: Path, content: dict[str, Any]) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def test_sharded_checkpoints_are_read(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    plain = sharded(tmp_path / "plain", state)
    nested = sharded(tmp_path / "nested", {"model": state, "optimizer": {"a": torch.ones(3)}, "step": 4})
    for folder in (plain, nested):
        found = tm.load_state_dict(folder, allow_pickle=True)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert_same_bits(found[name], tensor)
    (other,) = tm.load_state_dict(nested, key="optimizer", allow_pickle=True).values()
    assert_same_bits(other, torch.ones(3))
    with pytest.raises(ValueError, match=r"\.metadata is a pickled file.*Set allow_pickle"):
        tm.load_state_dict(plain)
    with pytest.raises(ValueError, match="no key 'ema'; its keys are model, optimizer"):
        tm.load_state_dict(nested, key="ema", allow_pickle=True)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this would run",)


def test_metadata_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sharded(tmp_path / "plain", {"a": torch.ones(2)})
    for content in (pickle.dumps(Code()), pickle.dumps({"a": 1}), b"\x80\x04", b""):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"no metadata of torch\.distributed"):
            tm.load_state_dict(folder, allow_pickle=True)
    assert "this would run" not in capsys.readouterr().out


def test_metadata_changes_no_class(tmp_path: Path) -> None:
    """Pickle's BUILD with slots sets attributes of whatever is on the stack: of a class, for everybody."""
    folder = sharded(tmp_path / "run", {"model": {"w": torch.zeros(2)}})
    attack = b"\x80\x02cpathlib\nPosixPath\nN}X\x06\x00\x00\x00existsccollections\nOrderedDict\ns\x86b."
    (folder / ".metadata").write_bytes(attack)
    with pytest.raises(ValueError, match="it changes a class"):
        tm.load_state_dict(folder, allow_pickle=True)
    assert tmp_path.exists() is True


def test_metadata_of_early_python_3_11_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its enumerations write a member as an attribute of their class; 3.11.2 does, 3.11.7 does not."""
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name))
    )
    folder = sharded(tmp_path / "run", {"w": torch.arange(3.0)})
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert_same_bits(tm.load_state_dict(folder, allow_pickle=True)["w"], torch.arange(3.0))


@pytest.mark.parametrize("attribute", ["__mro__", "__init_subclass__", "name"])
def test_metadata_reads_no_other_attribute(tmp_path: Path, attribute: str) -> None:
    folder = sharded(tmp_path / "run", {"w": torch.zeros(2)})
    kind = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    text = b"X" + len(attribute).to_bytes(4, "little") + attribute.encode()
    (folder / ".metadata").write_bytes(b"\x80\x02cbuiltins\ngetattr\n" + kind + text + b"\x86R.")
    with pytest.raises(ValueError, match=f"asks for the attribute {attribute}"):
        tm.load_state_dict(folder, allow_pickle=True)


@pytest.mark.parametrize("changes", [{"state_dict_metadata": [1]}, {"planner_data": {"w": 5}}])
def test_metadata_filled_otherwise_is_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = sharded(tmp_path / "run", {"w": torch.zeros(2)})
    content = pickle.loads((folder / ".metadata").read_bytes())
    vars(content).update(changes)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"no metadata of torch\.distributed"):
        tm.load_state_dict(folder, allow_pickle=True)


def test_unsharded_checkpoints_are_experts(tmp_path: Path) -> None:
    root = write_languages(tmp_path)
    states = {name: load_file(root / name / "model.safetensors") for name in "ab"}
    wrapped = {n: t.clone() for n, t in states["a"].items()} | {"lm_head.weight": torch.ones(1)}
    folder = sharded(tmp_path / "fsdp", {"model": wrapped, "optimizer": {"a": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"torch\.distributed checkpoint, no .*tm\.unshard\("):
        tm.Recipe(str(root / "base"), {"a": tm.Expert(str(folder))}).open(tmp_path / "w")
    out = tm.unshard(folder, tmp_path / "whole", like=root / "base")
    whole = load_file(out / "model.safetensors")
    assert whole.keys() == states["a"].keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in states["a"].items())
    opened = tm.Recipe(str(root / "base"), {"a": tm.Expert(str(out))}).open(tmp_path / "w")
    assert opened.task_vectors.deltas
    twice = sharded(tmp_path / "twice", {"model": states["a"], "ema": states["b"]})
    with pytest.raises(ValueError, match="several times: choose one by key, of 'model', 'ema'"):
        tm.unshard(twice, tmp_path / "no", like=root / "base")
    tm.unshard(twice, tmp_path / "ema", like=root / "base", key="ema")
    less = sharded(tmp_path / "less", {"model": {"model.norm.weight": torch.ones(3)}})
    with pytest.raises(ValueError, match="not all tensors of"):
        tm.unshard(less, tmp_path / "no", like=root / "base")
    assert not (tmp_path / "no").exists()


def test_metadata_larger_than_its_files_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "plain", {"a": torch.ones(64)})
    file = ShardedFile(folder)
    next(folder.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(ValueError, match="larger than the checkpoint's files"):
        ShardedFile(folder).read("a")
    next(folder.glob("*.distcp")).write_bytes(b"x" * 4096)
    with pytest.raises(ValueError, match="a cannot be read"):
        file.read("a")
