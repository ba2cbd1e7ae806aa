"""The two passes against a plain copy of the same bytes: one tensor of 16M elements, and a model of 150M.

Each figure is a bandwidth over the copy's, from the fastest of rounds that alternate all of them. What counts
as moved is what has to be: base and K experts read, and the merge written, or the gradient read. With one
thread the clock is the process's own, so that a busy machine counts less.

Legend: `K` experts.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.bench.__main__ import figure
from tests.bench.roofline import Achieved, draw
from trainmerge.kernels import Difference, ExpertWeight, using
from trainmerge.task_vectors.delta import Delta

EXPERTS, ELEMENTS, ROUNDS = 8, 1 << 24, 7
BARS = {"compiled": 0.70, "eager": 0.40}
PICTURE = Path(__file__).parents[1] / "results" / "roofline.png"


class Pass(NamedTuple):
    """One merge and one gradient of every parameter of a model."""

    deltas: Sequence[Delta]
    outs: Sequence[Tensor]  # the merge goes there, and they are the gradients

    @property
    def moved(self) -> int:
        """Bytes that either pass has to move."""
        return sum((EXPERTS + 2) * out.nbytes for out in self.outs)

    def weighted_sum(self) -> None:
        """Merge everything."""
        coefficients = torch.full((EXPERTS, 1), 0.3)
        for delta, out in zip(self.deltas, self.outs, strict=True):
            delta.merge(out, coefficients)

    def inner_products(self) -> None:
        """All coefficients' gradients."""
        for delta, out in zip(self.deltas, self.outs, strict=True):
            delta.inner(out, 1)


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, form: type = ExpertWeight) -> Pass:
    """Random weights near each other."""

    def near(base: Tensor) -> Tensor:
        return base + 1e-2 * torch.randn(base.shape).to(dtype)

    bases = [torch.randn(shape).to(dtype) for shape in shapes]
    deltas = [Delta(base, tuple(form(near(base)) for _ in range(EXPERTS))) for base in bases]
    return Pass(deltas, [torch.randn(shape).to(dtype) for shape in shapes])


def llama_shapes(
    hidden: int = 768, wide: int = 2048, layers: int = 18, vocabulary: int = 32000
) -> list[tuple[int, ...]]:
    """A tied Llama of 152M parameters."""
    layer: list[tuple[int, ...]] = [(hidden, hidden)] * 4
    layer += [(wide, hidden)] * 2 + [(hidden, wide)] + [(hidden,)] * 2
    return [(vocabulary, hidden), *layer * layers, (hidden,)]


def seconds(call: Callable[[], object]) -> float:
    """Of this process where it has one thread, of the clock on the wall where it has more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


def bandwidths(one: Pass) -> dict[str, float]:
    """Bytes a second of the copy and of both passes by both backends, the best of rounds that alternate."""
    half = torch.randn(one.moved // 8)  # float32; the copy reads it and writes as much
    target = torch.empty_like(half)
    calls = {"copy": lambda: target.copy_(half)}
    for backend in BARS:
        for name in ("weighted_sum", "inner_products"):
            calls[f"{name}_{backend}"] = _by(backend, getattr(one, name))
    for call in calls.values():
        call()  # compiles, and touches every page
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], seconds(call))
    return {name: one.moved / taken for name, taken in best.items()}


def _by(backend: str, call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with using(backend):
            call()

    return run


def main() -> None:
    """Print the figures of each size and dtype, and draw the roofline."""
    torch.manual_seed(0)
    made = {
        "": (torch.float32, [(ELEMENTS,)], ExpertWeight),
        "_difference": (torch.float32, [(ELEMENTS,)], Difference),
        "_bfloat16": (torch.bfloat16, [(ELEMENTS,)], ExpertWeight),
        "_150M": (torch.bfloat16, llama_shapes(), ExpertWeight),
    }
    achieved: list[Achieved] = []
    copies = []
    for suffix, (dtype, shapes, form) in made.items():
        found = bandwidths(make(shapes, dtype, form))
        copies.append(copy := found.pop("copy"))
        for name, rate in found.items():
            backend = name.rpartition("_")[2]
            barred = backend == "compiled" or dtype == torch.float32
            figure(f"{name}_over_copy{suffix}", rate / copy, "ratio", f">= {BARS[backend]}" if barred else "")
            achieved.append(Achieved(name + suffix, rate, dtype.itemsize, EXPERTS))
    draw(PICTURE, statistics.median(copies), achieved)


if __name__ == "__main__":
    main()
