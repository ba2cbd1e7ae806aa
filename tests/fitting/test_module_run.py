"""A fit of a plain module in a run folder: killed and resumed, it is the run that was never stopped.

Legend: `K` experts, `G` coefficient groups.
"""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.plain_modules import batches, expert_of, net
from tests.ranks import exit_code
from trainmerge.cli import main
from trainmerge.fitting.contents import content_sha256
from trainmerge.run.trajectory import read_trajectory

STEPS = 9


class Worlds:
    """The same modules, batches and settings in every process."""

    def __init__(self) -> None:
        self.base = net()
        self.experts = {name: expert_of(self.base, seed) for seed, name in enumerate("ab", 1)}
        self.lists = {name: batches(seed, 2) for seed, name in enumerate("ab", 10)}

    def loaders(self, kind: str) -> Mapping[str, Any]:
        """`lists` or `shuffled`."""
        return self.lists if kind == "lists" else self.shuffled()

    def shuffled(self) -> dict[str, DataLoader]:
        """Loaders that give other batches in every pass, and the same from one call to the next."""
        return {
            name: DataLoader(
                torch.cat(list(own)), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(4)
            )
            for name, own in self.lists.items()
        }

    def fit(self, loaders: Mapping[str, Any], run: Path | None, loss: Any, **more: Any) -> tm.FittedModule:
        settings = {"steps": STEPS, "save_every": 2, **more}
        return tm.fit_module(
            self.base, self.experts, loaders, loss, run=run, buffers="reestimate",
            combine=None, grouping=tm.Grouping("tensor"),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), **settings,
        )  # fmt: skip


class Entropy:
    """A loss that kills its process when it was called often enough."""

    def __init__(self, calls: int = 0) -> None:
        self.left = calls

    def __call__(self, outputs: Tensor, _: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        log_q = outputs.log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1)


def killed(kind: str, run: Path) -> None:
    """A fit that dies in its seventh step."""
    world = Worlds()
    world.fit(world.loaders(kind), run, Entropy(calls=2 * 6 + 1))


@pytest.fixture(scope="module")
def world() -> Worlds:
    return Worlds()


def lines(run: Path) -> Sequence[Mapping[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["lists", "shuffled"])
def test_a_killed_fit_resumes_to_the_same_bits(world: Worlds, tmp_path: Path, kind: str) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    alone = world.fit(world.loaders(kind), None, Entropy())
    want = world.fit(world.loaders(kind), whole, Entropy())
    assert_same_bits(alone.coefficients(), want.coefficients())
    assert exit_code(killed, kind, run) == -signal.SIGKILL
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-6.ckpt"]
    got = world.fit(world.loaders(kind), run, Entropy())
    assert_same_bits(got.coefficients(), want.coefficients())
    for name, tensor in want.module.state_dict().items():
        assert_same_bits(got.module.state_dict()[name], tensor)
    assert list(got.losses) == list(want.losses)
    assert lines(run) == lines(whole)
    assert [line["step"] for line in lines(run)] == list(range(STEPS))
    saved = tm.load_coefficients(run / "coefficients.safetensors")
    assert_same_bits(saved(), want.coefficients())
    for file in ("trajectory.bin", "coefficients.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    trajectory = read_trajectory(run / "trajectory.bin", *saved.raw.shape)
    assert trajectory is not None
    assert trajectory.steps.tolist() == list(range(STEPS + 1))


def test_a_finished_run_goes_on_and_is_returned(world: Worlds, tmp_path: Path) -> None:
    first = world.fit(world.lists, tmp_path / "run", Entropy(), steps=4)
    again = world.fit(world.lists, tmp_path / "run", Entropy(calls=1), steps=4)  # no loss is computed
    assert_same_bits(first.coefficients(), again.coefficients())
    assert list(again.losses) == list(first.losses)
    longer = world.fit(world.lists, tmp_path / "run", Entropy())
    assert_same_bits(longer.coefficients(), world.fit(world.lists, None, Entropy()).coefficients())


def test_other_models_settings_and_batches_are_refused(world: Worlds, tmp_path: Path) -> None:
    run = tmp_path / "run"
    world.fit(world.lists, run, Entropy(), steps=3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match=r"holds a run with different experts, data or settings:\n  clip: 0"):
        world.fit(world.lists, run, Entropy(), clip=1.0)
    other = Worlds()
    other.experts["b"] = expert_of(world.base, 7)
    with pytest.raises(ValueError, match=r"checksums\.b\.state"):
        other.fit(world.lists, run, Entropy())
    swapped = {"a": world.lists["a"], "b": world.lists["b"][::-1]}
    with pytest.raises(ValueError, match=r"the loaders of \['b'\] give other batches than in its first 3"):
        world.fit(swapped, run, Entropy())
    coefficients = run / "coefficients.safetensors"
    assert coefficients.read_bytes() == before[coefficients]
    strange = {name: [object()] for name in "ab"}
    with pytest.raises(ValueError, match=r"a object, so a run could not tell|contents of a object cannot"):
        tm.fit_module(
            world.base, world.experts, strange, Entropy(), steps=1, run=tmp_path / "new", buffers="keep"
        )


def test_report_reads_it_and_export_says_why_not(
    world: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    world.fit(world.lists, run, Entropy())
    page = tm.write_report(run).read_text()
    assert "a module in memory" in page
    assert "A learned merge of a, b into Sequential" in page
    assert (run / "report/loss.csv").is_file()
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert "a run of tm.fit_module, whose base and experts are modules" in capsys.readouterr().err
    assert json.loads((run / "manifest.json").read_text())["experts"] == ["a", "b"]


def test_contents_are_told_apart() -> None:
    class Item:
        def __init__(self, pixels: Tensor) -> None:
            self.pixels = pixels

    same = [
        [torch.arange(3), {"x": torch.ones(2)}],
        (torch.arange(3), {"x": torch.ones(2)}),
    ]
    assert len({content_sha256(value) for value in same}) == 1
    others = [
        torch.arange(3), torch.arange(3).float(), torch.arange(3)[None], torch.arange(3).numpy(), [0, 1, 2],
        ["0", 1, 2], Item(torch.arange(3)), None, {"pixels": 1}, torch.tensor(True), b"a", "a",
        torch.ones(2).bfloat16(), torch.ones(2, dtype=torch.cfloat),
    ]  # fmt: skip
    assert len({content_sha256(value) for value in others}) == len(others)
    assert content_sha256(Item(torch.ones(2))) == content_sha256(Item(torch.ones(2)))
    for wrong in (object(), iter([1]), nn.ReLU):
        with pytest.raises(ValueError, match="cannot be compared"):
            content_sha256([wrong])
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        content_sha256(endless)
