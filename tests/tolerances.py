"""Tolerances for results that another processor may round otherwise.

A computed inner product of n terms is the exact one of numbers that are off by at most n x eps each (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1). So results differ between processors about as
much as they do when every weight is off by that: an entry's tolerance is how far it moved in several such
draws, with a margin.
"""

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TERMS = 512  # more than any inner product of the fixtures has: 22 x 16 of a gradient with a task vector
EPS = 2.0**-24  # float32, rounded to nearest
DRAWS = 8
MARGIN = 4.0  # random draws do not find the worst direction


def perturbed(world: Path, out: Path, draw: int) -> Path:
    """A copy of a folder of checkpoints, its weights off by at most TERMS x EPS of themselves.

    A tensor of one name is off by the same in base and experts, and so is their difference.
    """
    shutil.copytree(world, out, ignore=shutil.ignore_patterns("runs", "exports", "expected"))
    for file in sorted(out.rglob("*.safetensors")):
        save_file(
            {name: _off(name, tensor, draw) for name, tensor in load_file(file).items()},
            file,
            {"format": "pt"},
        )
    return out


def spread(result: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The tolerance of each entry of `result`, [*S], from the results of the draws."""
    moved = torch.stack([(other.double() - result.double()).abs() for other in others]).amax(dim=0)
    return (MARGIN * moved + 2 * EPS * result.double().abs()).float()


def assert_within(found: Tensor, wanted: Tensor, tolerance: Tensor, what: str) -> None:
    """Every entry of `found` is as near to `wanted` as its tolerance."""
    assert found.shape == wanted.shape, what
    over = (found.double() - wanted.double()).abs() - tolerance.double()
    assert float(over.max()) <= 0, f"{what}: {float(over.max()):.1e} beyond the tolerance"


def _off(name: str, tensor: Tensor, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + draw)
    off = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (tensor.double() * (1 + TERMS * EPS * off)).to(tensor.dtype)
