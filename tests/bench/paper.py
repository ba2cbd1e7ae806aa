"""The tables of notebooks/docs/many-gpus.md: time of a step on paper, by `reside`; nothing is measured here.

P is in bytes of bfloat16; activations are counted as one stored input per block (they are recomputed).
What is sent runs beside forwards and backwards (`plan.overlap`); tasks take turns where a device has the
whole model, and a single device's merges are written in the backward before (`model.one_pass`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from trainmerge.model.residency import Residency, Room, Share, Vectors, reside
from trainmerge.plan.devices import STATED
from trainmerge.plan.overlap import Computing, Pass, merging_seconds
from trainmerge.plan.plan import PINNED, USABLE

FLOPS = 400e12  # a device and second: bfloat16 in practice
REACHED = 0.8  # of a data sheet's memory bandwidth
PINNED_LINK, FILE_LINK = 25e9, 10e9  # bytes a device and second, from pinned memory, and from pages of a file
INSIDE, BETWEEN = 300e9, 50e9  # bytes a device and second, inside a machine of eight and between machines
MACHINE = 8
AHEAD = 1  # blocks gathered ahead of the one that runs
MODELS = {"7B": (7e9, 32, 4096), "70B": (70e9, 80, 8192), "405B": (405e9, 126, 16384)}
EXAMPLES, TOKENS = 4, 512
COLUMNS: dict[str, tuple[Vectors, float]] = {  # where, and bytes of an expert's weight
    "auto": ("auto", 2.0),
    "auto, `Int8`": ("auto", 1.0),
    "host": ("host", 2.0),
    "file": ("file", 2.0),
}


class Step(NamedTuple):
    """One way to take a step on each device."""

    shards: int  # devices that share one model; the others replicate it
    memory: float  # bytes, without base and task vectors
    computing: float  # seconds of forwards and backwards, or of exchange where that is longer
    merging: float  # seconds that both passes add
    residency: Residency

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.computing + self.merging


def steps(
    model: str, experts: int, devices: int, card: str, vectors: Vectors, width: float
) -> Iterator[Step]:
    """Every way that fits: shards inside a machine or across, gradients accumulated, in turns, or neither."""
    parameters, blocks, hidden = MODELS[model]
    device, size = STATED[card], 2 * parameters
    local = max(1.0, EXAMPLES / devices)  # a device has at least one example a task
    work = 6 * parameters * experts * local * TOKENS / FLOPS
    shards = min(devices, MACHINE)
    while shards <= devices:
        sent = experts * 4 * size * (shards - 1) / shards
        computing = max(work, sent / (INSIDE if shards <= MACHINE else BETWEEN))
        read = (size + experts * width * parameters) / blocks / shards  # of one block
        for keep, together in ((False, 1), (True, 1), (False, experts))[: 3 if shards == 1 else 2]:
            stored = 2 * blocks * hidden * TOKENS * local * together
            memory = size / shards * (1 + keep) + (2 + AHEAD) * size / blocks + stored + 2 * read
            room = Room(
                int(USABLE * device.memory - memory), int(PINNED * device.host), PINNED_LINK, device.bandwidth
            )
            backwards = experts // together
            count = 1 if keep else backwards
            merges = int(devices > 1)  # one process writes them in the backward before
            shares = {str(block): Share(int(read), merges + count) for block in range(blocks)}
            if room.device < 0:
                continue
            try:
                residency = reside(vectors, shares, room)
            except ValueError:
                continue
            one = a_pass(shares, residency, device.bandwidth)
            own = Computing(computing, backwards, whole=shards > 1)
            merge = one._replace(sending=one.sending * merges)
            yield Step(shards, memory, computing, merging_seconds(own, merge, one, count), residency)
        shards *= 2


def a_pass(shares: dict[str, Share], residency: Residency, bandwidth: float) -> Pass:
    """A pass: seconds of the device's memory, and of its link."""
    read = dict.fromkeys(("device", "host", "file"), 0)
    for name, share in shares.items():
        read[residency.places.get(name, "file")] += share.nbytes
    link = read["host"] / PINNED_LINK + read["file"] / FILE_LINK
    return Pass(sum(read.values()) / (REACHED * bandwidth), link)


def cell(model: str, experts: int, devices: int, card: str, vectors: Vectors, width: float) -> str:
    """Seconds and the merge's share of the fastest way, and its shards where these are across machines."""
    found = min(
        steps(model, experts, devices, card, vectors, width), key=lambda step: step.seconds, default=None
    )
    if found is None:
        return "-"
    across = f", S={found.shards}" if found.shards > MACHINE else ""
    held = found.residency.held
    share = f"{found.merging / found.seconds:.0%}"
    bold = f"**{share}**" if held["device"] == sum(held.values()) else share
    return f"{found.seconds:.1f} s, {bold}{across}"


def table(card: str) -> str:
    """Markdown: models, experts K and devices N down, places across."""
    lines = ["| model | K | N | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for model in MODELS:
        for experts in (3, 8):
            for devices in (1, 8, 64):
                cells = [cell(model, experts, devices, card, *place) for place in COLUMNS.values()]
                if any(text != "-" for text in cells):
                    lines.append(f"| {model} | {experts} | {devices} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in ("h100", "h200"):
        print(f"\n{name}\n{table(name)}")
