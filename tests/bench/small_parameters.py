"""What one call for all small parameters could save at most: norms and biases of MiniLM and a 152M Llama.

Eager kernels, one thread, the process's own time, the fastest of rounds. A pass over all parameters, over the
small ones alone, and over one parameter with as many entries: such a call would also have to gather what lies
apart, and to weigh every parameter by its own coefficients.
"""

from collections.abc import Callable, Sequence

import torch

from tests.bench.__main__ import figure
from tests.bench.kernels import Pass, llama_shapes, make, seconds

ROUNDS = 5
KINDS = ("weighted_sum", "inner_products")


def minilm_shapes(hidden: int = 384, wide: int = 1536, layers: int = 6) -> list[tuple[int, ...]]:
    """all-MiniLM-L6: 23M parameters."""
    norm: list[tuple[int, ...]] = [(hidden,)] * 2
    layer = (
        [(hidden, hidden), (hidden,)] * 4 + norm + [(wide, hidden), (wide,), (hidden, wide), (hidden,)] + norm
    )
    return [(30522, hidden), (512, hidden), (2, hidden), *norm, *layer * layers, (hidden, hidden), (hidden,)]


def fastest(call: Callable[[], None]) -> float:
    """Seconds of a warm call."""
    call()
    return min(seconds(call) for _ in range(ROUNDS))


def report(name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Print the share of each pass that small parameters take, and how much of it one call would not."""
    whole = make(shapes, dtype)
    places = [place for place, shape in enumerate(shapes) if len(shape) == 1]
    small = Pass([whole.deltas[place] for place in places], [whole.outs[place] for place in places])
    together = make([(sum(out.numel() for out in small.outs),)], dtype)
    for kind in KINDS:
        all_of, own, one = (fastest(getattr(part, kind)) for part in (whole, small, together))
        figure(f"{kind}_small_share_{name}", own / all_of, "share", "")
        figure(f"{kind}_small_saved_at_most_{name}", (own - one) / all_of, "share", "")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    report("minilm", minilm_shapes(), torch.float32)
    report("150M", llama_shapes(), torch.bfloat16)
