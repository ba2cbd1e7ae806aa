"""The backend of the two passes: `eager`, `compiled` or `triton`, by name or by device.

Unless one is named, a CPU's passes are eager. Compiled ones take about half of their time, which saves 0.05
s a GB, but importing the compiler and compiling cost 20 s and more: a fit wins them back after some 400 GB,
an export never. A GPU's passes are compiled, since eager ones launch a kernel for every operation, and those
of integers and low-rank task vectors, which no flat loop covers, are Triton's: not measured yet.

The choice is per process, not per thread, because autograd runs a GPU's gradient hooks in its own threads.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

import trainmerge.kernels.calls as calls
import trainmerge.kernels.compiled as compiled
import trainmerge.kernels.eager as eager
from trainmerge.kernels.calls import Merge, Product
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import LowRank, Term, bytes_read


class Backend(NamedTuple):
    """Both passes over any number of parameters."""

    run_merges: Callable[[Sequence[Merge]], None]
    run_products: Callable[[Sequence[Product]], list[Tensor]]


NAMES = ("auto", "eager", "compiled", "triton")
VARIABLE = "TRAINMERGE_KERNELS"

_chosen = "auto"


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, not {name!r}")
    return name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the passes by this backend, in the whole process; `auto` chooses by device.

    Raises:
        ValueError: there is no such backend.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "the kernels")
    try:
        yield
    finally:
        _chosen = before


def chosen(device: torch.device) -> str:
    """The backend that runs the passes of tensors on this device.

    Raises:
        ValueError: TRAINMERGE_KERNELS is not a backend.
    """
    if (name := _named()) == "auto":
        return "compiled" if device.type == "cuda" else "eager"
    return name


def _named() -> str:
    """The backend that somebody named, or `auto`."""
    return _chosen if _chosen != "auto" else _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def backend_of(device: torch.device, terms: Sequence[Term]) -> str:
    """The backend of one call: `chosen`; unless one is named, Triton for a GPU's terms that are not dense."""
    dense = not any(isinstance(term, LowRank | Quantised) for term in terms)
    ours = device.type == "cuda" and not dense and _named() == "auto" and _has_triton()
    return "triton" if ours else chosen(device)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def shareable(call: Merge | Product, held: bool = False) -> int:
    """Bytes that a call keeps alive while it waits to share a launch; 0 if it runs by itself.

    `held`: base and terms, and what a merge writes, are kept by somebody else anyway. Then all merges of a
    pass share a launch, and products wait for their gradients' bytes only.
    """
    if chosen(call[0].device) != "triton":
        return 0
    from trainmerge.kernels.triton_segments import supported

    ours = supported(call[0], call.base, call.terms)
    if held and ours:
        return call.grad.nbytes if isinstance(call, Product) else 1
    return call[0].nbytes + bytes_read(call.base, call.terms) if ours else 0


def waiting(device: torch.device) -> int:
    """Bytes of queued calls at most."""
    return calls.LAUNCH if chosen(device) == "triton" else 0


def _backend(name: str) -> Backend:
    if name == "triton":
        import trainmerge.kernels.triton_kernels as triton_kernels  # Triton may not be installed

        return Backend(triton_kernels.run_merges, triton_kernels.run_products)
    passes = compiled if name == "compiled" else eager

    def run_merges(merges: Sequence[Merge]) -> None:
        for merge in merges:
            passes.weighted_sum(*merge)

    return Backend(run_merges, lambda products: [passes.inner_products(*product) for product in products])


def run_merges(merges: Sequence[Merge]) -> None:
    """`weighted_sum` of each call, all on one device."""
    for name, places in _by_backend((merge.out.device, merge.terms) for merge in merges).items():
        _backend(name).run_merges([merges[i] for i in places])


def run_products(products: Sequence[Product]) -> list[Tensor]:
    """`inner_products` of each call, all on one device."""
    found: dict[int, Tensor] = {}
    for name, places in _by_backend((product.grad.device, product.terms) for product in products).items():
        found |= zip(places, _backend(name).run_products([products[i] for i in places]), strict=True)
    return [found[i] for i in range(len(products))]


def _by_backend(queued: Iterable[tuple[torch.device, Sequence[Term]]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for i, call in enumerate(queued):
        places.setdefault(backend_of(*call), []).append(i)
    return places


def weighted_sum(out: Tensor, base: Tensor, terms: Sequence[Term], coefficients: Tensor) -> None:
    """Write `out` = base + sum_k coefficients[k, chunk] * tau_k. `out`, `base` [*S], coefficients [K, C].

    All-zero coefficients give the base, a one-hot vector on `ExpertWeight` terms that expert, bit for bit.
    """
    run_merges([Merge(out, base, terms, coefficients)])


def inner_products(grad: Tensor, base: Tensor, terms: Sequence[Term], chunks: int) -> Tensor:
    """<grad, tau_k> per chunk, all K in one read of `grad` [*S] -> [K, C], float32 (float64 for float64)."""
    (products,) = run_products([Product(grad, base, terms, chunks)])
    return products
