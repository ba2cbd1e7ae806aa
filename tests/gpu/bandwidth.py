"""Both passes against a copy of the same bytes on the same device, with vectors that are already there."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tests.bench.kernels import llama_shapes
from tests.gpu.contract import random_delta
from tests.gpu.setting import Row, Setting, row
from trainmerge.kernels import (
    Difference,
    ExpertWeight,
    LowRank,
    Merge,
    Product,
    Quantised,
    bytes_read,
    run_merges,
    run_products,
    using,
)

EXPERTS = (3, 8)
FORMS = {"experts": ExpertWeight, "differences": Difference, "int8": Quantised, "low-rank": LowRank}
DTYPES = (torch.bfloat16, torch.float32)


class Passes(NamedTuple):
    """The calls of one merge and one gradient of every parameter."""

    merges: Sequence[Merge]
    products: Sequence[Product]

    @property
    def moved(self) -> int:
        """Bytes that either pass has to move: base and terms, and the merge or the gradient."""
        return sum(bytes_read(m.base, m.terms) + m.out.nbytes for m in self.merges)


def passes(shapes: Sequence[Sequence[int]], form: type, experts: int, like: torch.Tensor) -> Passes:
    """Random parameters of these shapes."""
    coefficients = torch.full((experts, 1), 0.3)
    merges = []
    for i, shape in enumerate(shapes):
        delta = random_delta(shape, [form] * experts, like, seed=i)
        merges.append(Merge(torch.empty_like(delta.base), delta.base, delta.terms, coefficients))
    return Passes(merges, [Product(m.base, m.base, m.terms, 1) for m in merges])


def copy_seconds(setting: Setting, moved: int) -> float:
    """Of a copy that reads half of so many bytes and writes the other half."""
    source = torch.ones(moved // 8, device=setting.device)
    target = torch.empty_like(source)
    return setting.seconds(lambda: target.copy_(source))


def run(setting: Setting) -> Iterator[Row]:
    """Shares of the copy's bandwidth: one large matrix, and the parameters of a Llama of 150M."""
    large: list[tuple[int, ...]] = [(64, 64)] if setting.tiny else [(8192, 8192)]
    models = {"matrix": large, "150M": large * 3 if setting.tiny else llama_shapes()}
    for model, shapes in models.items():
        for dtype in DTYPES:
            like = torch.empty(0, dtype=dtype, device=setting.device)
            for name, form in FORMS.items():
                if form is LowRank and model == "150M":
                    continue  # its vectors have no factors
                for experts in EXPERTS[:1] if setting.tiny else EXPERTS:
                    made = passes(shapes, form, experts, like)
                    kind = str(dtype).removeprefix("torch.")
                    yield from shares(setting, made, f"{model}_{kind}_{name}_{experts}")
                    del made


def shares(setting: Setting, made: Passes, case: str) -> Iterator[Row]:
    """Of each backend and pass, in one run."""
    copy = copy_seconds(setting, made.moved)
    for backend in setting.backends:
        with using(backend):
            for name, call in (
                ("merge", lambda: run_merges(made.merges)),
                ("products", lambda: run_products(made.products)),
            ):
                taken = setting.seconds(call)
                yield row(f"{name}_{backend}_over_copy_{case}", copy / taken, "of the copy's bandwidth")
