"""The contract of both passes on the device: every backend, dtype and form of task vector."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tests.contracts import assert_delta_contract
from tests.gpu.setting import Row, Setting, row
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Quantised, Term, Untouched, using
from trainmerge.task_vectors.delta import Delta

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXES: dict[str, Sequence[type]] = {
    "experts": [ExpertWeight] * 3,
    "differences": [Difference] * 2,
    "int8": [Quantised] * 3,
    "low-rank": [LowRank] * 3,
    "mixed": [Difference, ExpertWeight, LowRank, Untouched, Quantised, ExpertWeight, LowRank],
}
SHAPES = ([7], [5, 3], [64, 33], [130, 2000], [6, 4, 5], [1024, 1024])
RANK = 5


def random_delta(
    shape: Sequence[int], forms: Sequence[type], like: Tensor, seed: int = 0, rank: int = RANK
) -> Delta:
    """A random parameter in the dtype and on the device of `like`, one term for each of `forms`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    base = draw(*shape)
    rows, width = shape[0], base[0].numel()

    def term(form: type) -> Term:
        if form is Difference:
            return Difference(0.05 * draw(*shape))
        if form is ExpertWeight:
            return ExpertWeight(base + 0.05 * draw(*shape))
        if form is LowRank:
            return LowRank(draw(rows, rank), draw(rank, width), 0.05)
        if form is Quantised:
            codes = torch.randint(-127, 128, (rows, width), generator=generator).to(torch.int8)
            scale = 4e-4 * (1 + torch.rand(rows, generator=generator))
            return Quantised(codes.to(like.device), scale.to(like.device))
        return Untouched()

    return Delta(base, tuple(term(form) for form in forms))


def run(setting: Setting) -> Iterator[Row]:
    """Raises AssertionError at the first broken promise."""
    shapes = SHAPES[:3] if setting.tiny else SHAPES
    for backend in setting.backends:
        for dtype in DTYPES:
            like, cases = torch.empty(0, dtype=dtype, device=setting.device), 0
            for mix, forms in MIXES.items():
                for shape in shapes:
                    delta = random_delta(shape, forms, like)
                    for chunks in sorted({1, min(3, shape[0])}):
                        with using(backend):
                            checked(f"{backend} {dtype} {mix} {shape} {chunks} chunks", delta, chunks)
                        cases += 1
            yield row(f"contract_{backend}_{str(dtype).removeprefix('torch.')}", cases, "cases")


def checked(case: str, delta: Delta, chunks: int) -> None:
    """The contract, with the case in its error."""
    try:
        assert_delta_contract(delta, chunks, torch.Generator().manual_seed(1))
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error
