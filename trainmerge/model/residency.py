"""Where a fit's base and task vectors are held: on the device, in host memory, or in their mapped files.

Every step reads all of them, to merge and for the coefficients' gradient, in one pass (`model.one_pass`) or
more. What is on the device crosses its link once per fit; everything else crosses it in every pass. A byte
held on the device saves as many bytes per step as passes read it, whatever its form, so a form of fewer bytes
per weight (`Int8`, low rank) lets more parameters in.

The decision is a function of sizes alone: it runs, and is tested, without a device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from trainmerge.system.memory import format_size

Vectors = Literal["auto", "device", "host", "file"]
Place = Literal["device", "host", "file"]
WORDS = {"device": "on the device", "host": "in host memory", "file": "in mapped files"}


@dataclass(frozen=True)
class Share:
    """One parameter's base and task vectors, as one device reads them: its rows only, if it has a shard.

    Args:
        nbytes: Bytes that a pass reads.
        reads: Passes of a step that read them.
    """

    nbytes: int
    reads: int = 2


@dataclass(frozen=True)
class Room:
    """What one device has left for base and task vectors.

    Args:
        device: Free bytes of its memory, beside a step's own needs.
        host: Free bytes of host memory, of which each device of a machine has a part.
        link: Bytes per second from host memory; 0 where that is the device's own memory.
        bandwidth: Bytes per second from its own memory.
    """

    device: int
    host: int
    link: float = 0.0
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Residency:
    """The place of each parameter's base and task vectors; what is not named is read from its file."""

    places: Mapping[str, Place] = field(default_factory=dict)
    held: Mapping[Place, int] = field(default_factory=dict)  # bytes at each place
    sent: int = 0  # bytes over the link in each step: what is not on the device, in each pass that reads it

    def at(self, place: Place) -> frozenset[str]:
        """The parameters that are held there."""
        return frozenset(name for name, own in self.places.items() if own == place)

    def __str__(self) -> str:
        parts = [f"{format_size(count)} {WORDS[place]}" for place, count in self.held.items() if count]
        return ", ".join(parts) or "nothing to read"


def reside(vectors: Vectors, shares: Mapping[str, Share], room: Room | None = None) -> Residency:
    """The place of each parameter.

    `auto` fills the device, then host memory, and leaves the rest in files: parameters that more passes read
    first, and of these the largest first. It holds nothing where nothing is gained: without a link (the pages
    of the files are in the memory that would hold copies), or if the room is unknown.

    Args:
        vectors: The setting.
        shares: Parameter -> its bytes and reads on one device.
        room: The device's room; None if it is unknown.

    Raises:
        ValueError: `device` or `host`, and the room is known to be too small.
    """
    if vectors == "auto":
        return _residency(shares, _filled(shares, room) if room and _gains(room) else {})
    if vectors != "file" and room is not None:
        _check(vectors, sum(share.nbytes for share in shares.values()), room)
    return _residency(shares, dict.fromkeys(shares, vectors))


def _gains(room: Room) -> bool:
    """Whether the device reads its own memory faster than host memory."""
    return 0 < room.link < room.bandwidth


def _filled(shares: Mapping[str, Share], room: Room) -> dict[str, Place]:
    """Device first, then host memory."""
    left: dict[Place, int] = {"device": room.device, "host": room.host}
    places: dict[str, Place] = {}
    for name in sorted(shares, key=lambda n: (-shares[n].reads, -shares[n].nbytes)):
        for place, free in left.items():
            if shares[name].nbytes <= free:
                places[name] = place
                left[place] -= shares[name].nbytes
                break
    return places


def _residency(shares: Mapping[str, Share], places: Mapping[str, Place]) -> Residency:
    held: dict[Place, int] = dict.fromkeys(get_args(Place), 0)
    sent = 0
    for name, share in shares.items():
        place = places.get(name, "file")
        held[place] += share.nbytes
        sent += share.nbytes * share.reads * (place != "device")
    return Residency(places, held, sent)


def _check(vectors: Place, needed: int, room: Room) -> None:
    free = room.device if vectors == "device" else room.host
    if needed > free:
        raise ValueError(
            f"model.vectors: base and task vectors have {format_size(needed)}, and {format_size(free)} are "
            f"free {WORDS[vectors]}: set model.vectors to auto, which holds what fits, or model.quantise, or "
            "share the model among more devices (model.sharded)"
        )
