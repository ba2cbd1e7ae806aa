"""Where task vectors are held: the decision by hand, and fits on a stand-in device that counts."""

from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.fitting.test_fit import build, learned
from tests.stand_in import CountedLink, behind
from tests.world import write_world
from trainmerge.fitting.vector_bytes import vector_bytes
from trainmerge.model import merged_weights
from trainmerge.model.residency import Residency, Room, Share, Vectors, reside
from trainmerge.task_vectors.prefetch import largest_block

SHARES = {"a": Share(40), "b": Share(30), "c": Share(20), "fixed": Share(25, reads=1)}
STEPS = 3


def places(vectors: Vectors, room: Room | None) -> str:
    """The first letters of the places of SHARES."""
    residency = reside(vectors, SHARES, room)
    assert sum(residency.held.values()) == 115
    off = [name for name in SHARES if residency.places.get(name, "file") != "device"]
    assert residency.sent == sum(SHARES[name].nbytes * SHARES[name].reads for name in off)
    return "".join(residency.places.get(name, "file")[0] for name in SHARES)


def test_auto_fills_the_device_then_host_memory() -> None:
    def behind_a_link(device: int, host: int) -> str:
        return places("auto", Room(device, host, link=1.0, bandwidth=50.0))

    assert behind_a_link(1000, 0) == "dddd"
    assert behind_a_link(0, 1000) == "hhhh"
    assert behind_a_link(0, 0) == "ffff"
    assert behind_a_link(90, 1000) == "dddh"  # what fewer passes read is the last
    assert behind_a_link(65, 50) == "dhdf"  # b is too large for what is left, c is not
    assert behind_a_link(39, 45) == "hdff"


def test_auto_holds_nothing_where_nothing_is_gained() -> None:
    assert places("auto", None) == "ffff"
    assert places("auto", Room(1000, 1000)) == "ffff"  # a processor: no link
    assert places("auto", Room(1000, 1000, link=9.0, bandwidth=9.0)) == "ffff"


def test_a_place_that_is_named_is_used_or_refused() -> None:
    for vectors, letter in (("device", "d"), ("host", "h"), ("file", "f")):
        assert places(vectors, None) == 4 * letter  # type: ignore[arg-type]
    assert places("file", Room(0, 0)) == "ffff"
    assert places("device", Room(115, 0)) == "dddd"
    with pytest.raises(ValueError, match=r"115 B, and 114 B are free on the device: set model.vectors to"):
        reside("device", SHARES, Room(114, 1000))
    with pytest.raises(ValueError, match=r"115 B, and 0 B are free in host memory"):
        reside("host", SHARES, Room(1000, 0))
    with pytest.raises(ValueError, match="vectors must be"):
        tm.MergeModule(tm.Recipe("base", {"a": tm.Expert("a")}), vectors="gpu")  # type: ignore[arg-type]


def test_it_says_how_much_is_where() -> None:
    room = Room(40, 30, link=1.0, bandwidth=2.0)
    assert (
        str(reside("auto", SHARES, room)) == "40 B on the device, 30 B in host memory, 45 B in mapped files"
    )
    assert str(Residency()) == "nothing to read"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


@pytest.fixture(scope="module")
def plain(world: Path) -> torch.Tensor:
    """The coefficients of a fit from files on the processor."""
    fitted(world, world / "plain")
    return learned(world / "plain")


def fitted(world: Path, run: Path, room: Room | None = None, **settings: object) -> tm.MergeModule:
    module, data = build(world, run, **settings)
    module.room = room
    trainer = tm.make_trainer(run, max_steps=STEPS, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)
    return module


@pytest.mark.parametrize("vectors", ["device", "host"])
def test_copies_in_memory_give_the_same_bits(
    vectors: Vectors, world: Path, plain: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(world, tmp_path / "run", vectors=vectors)
    assert_same_bits(learned(tmp_path / "run"), plain)
    where = "on the device" if vectors == "device" else "in host memory"
    assert f"{where}\n" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("where", ["device", "host", "file", "half"])
def test_a_fit_on_a_stand_in_sends_what_it_must(
    where: str, keep: bool, world: Path, plain: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the device is sent once per fit, the rest once per pass, less what a turn finds there."""
    link, opened = CountedLink(), build(world, tmp_path / "sizes")[0]
    monkeypatch.setattr(merged_weights, "link_to", behind(link))
    sizes = vector_bytes(opened)
    whole, ahead = sum(sizes.values()), largest_block(sizes)
    room = Room(whole // 2, 0, link=1.0, bandwidth=2.0)
    vectors = "auto" if where == "half" else where
    run = tmp_path / "run"
    module = fitted(world, run, room if where == "half" else None, vectors=vectors, keep_gradients=keep)
    assert module.schedule.keep == keep
    if not keep:
        assert_same_bits(learned(run), plain)
    stays = {"device": whole, "half": whole // 2}.get(where, 0)
    assert link.pinned == pytest.approx(whole * (where == "host"), rel=0.1)  # a cache line each: tiny tensors
    assert stays - max(sizes.values()) <= link.alive <= stays + 2 * ahead
    assert link.highest <= stays + 2 * ahead + max(sizes.values())  # a reader may still have one more
    if where == "device":
        assert {*link.sends.values()} == {1}
        assert link.bytes == whole
        return
    collected = sum(sizes[name] for name in module.resident.merged._supplied.order._recent)
    assert collected > 0.8 * whole
    read = STEPS * (whole + collected * (1 if keep else 3))  # by all passes
    turns, off = 2 * STEPS - 1, 1 - stays / whole
    if where == "half":  # each half lacks parameters of its own, so only its size is known
        assert link.bytes <= off * read + stays + ahead
    else:
        passes = STEPS * (
            2 if keep else 4
        )  # a block is most of so small a model: it may stay between any two
        assert read - (passes - 1) * 2 * ahead <= link.bytes <= read - turns * ahead


def test_tasks_that_take_turns_have_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One backward for all tasks: every block crosses the link once per pass, and wherever it is held."""
    sizes = vector_bytes(build(world, tmp_path / "sizes")[0])
    whole, ahead = sum(sizes.values()), largest_block(sizes)
    found = {}
    for where in ("device", "host", "file", "half"):
        link = CountedLink()
        monkeypatch.setattr(merged_weights, "link_to", behind(link))
        room = Room(whole // 2, 0, link=1.0, bandwidth=2.0) if where == "half" else None
        vectors = "auto" if where == "half" else where
        fitted(world, tmp_path / where, room, vectors=vectors, tasks_per_backward=3)
        found[where] = learned(tmp_path / where)
        assert link.bytes <= (whole if where == "device" else 2 * STEPS * whole)
        assert link.highest <= link.alive + 2 * ahead + max(sizes.values())
    for own in found.values():
        assert_same_bits(own, found["device"])
