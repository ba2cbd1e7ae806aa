"""Geometry of the task vectors: inner products and sign conflicts per parameter, in one pass.

Norms, cosines and conflicts, over any set of parameters, are quotients of sums of these.

Legend: `P` parameters, `K` experts, `*S` parameter shape, `n` its size.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from trainmerge.kernels import Untouched
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.workspace import cached, digest, metadata_of, open_cached
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term
from trainmerge.task_vectors.pieces import in_pieces


@dataclass(frozen=True)
class Geometry:
    """Sums over each parameter, float64."""

    names: tuple[str, ...]  # P
    gram: Tensor  # [P, K, K]: <tau_i, tau_j>
    base: Tensor  # [P]: <W, W>
    base_gram: Tensor  # [P, K]: <W, tau_k>
    both: Tensor  # [P, K, K]: entries that both change
    opposed: Tensor  # [P, K, K]: entries that they change in opposite directions
    sizes: Tensor  # [P, K]: ||tau_k||_1

    def of(self, names: Iterable[str]) -> "Geometry":
        """The sums over these parameters: P becomes 1."""
        places = {name: place for place, name in enumerate(self.names)}
        chosen = [places[name] for name in names if name in places]

        def added(tensor: Tensor) -> Tensor:
            return tensor[chosen].sum(dim=0, keepdim=True)

        return Geometry(
            ("",),
            added(self.gram),
            added(self.base),
            added(self.base_gram),
            added(self.both),
            added(self.opposed),
            added(self.sizes),
        )

    def norms(self) -> Tensor:
        """||tau_k||, [P, K]."""
        return self.gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()

    def relative_norms(self) -> Tensor:
        """||tau_k|| / ||W||, [P, K]; NaN where the base is zero."""
        return self.norms() / self.base.sqrt()[:, None].where(self.base[:, None] > 0, torch.nan)

    def cosines(self) -> Tensor:
        """Cosine of tau_i and tau_j, [P, K, K]; NaN where one of them is zero."""
        norms = self.norms()
        scale = norms[:, :, None] * norms[:, None, :]
        return (self.gram / scale.where(scale > 0, torch.nan)).clamp(-1, 1)

    def conflicts(self) -> Tensor:
        """Among entries that both change, the share with opposite signs, [P, K, K]; NaN if there are none.

        Random signs give one half.
        """
        return self.opposed / self.both.where(self.both > 0, torch.nan)

    def cosines_with_base(self) -> Tensor:
        """Cosine of W and the expert's own weights W + tau_k, [P, K]: near 0, it was trained from scratch."""
        squares = self.base[:, None] + 2 * self.base_gram + self.gram.diagonal(dim1=1, dim2=2)
        scale = (self.base[:, None] * squares.clamp(min=0)).sqrt()
        return (self.base[:, None] + self.base_gram) / scale.where(scale > 0, torch.nan)


@torch.no_grad()
def measure_geometry(task_vectors: TaskVectors) -> Geometry:
    """Compute the sums; reads every task vector once and needs a few MiB per expert."""
    names = tuple(task_vectors.deltas)
    K = len(task_vectors.experts)
    sums = {name: [torch.zeros(shape, dtype=torch.float64) for shape in _shapes(K)] for name in names}
    for name, whole in track(task_vectors.deltas.items(), description="measuring task vectors"):
        for _, _, delta in in_pieces(name, whole):
            for total, part in zip(sums[name], _sums(delta), strict=True):
                total += part
    columns = zip(*sums.values(), strict=True)
    return Geometry(names, *(torch.stack(column) for column in columns))


def _shapes(K: int) -> list[Sequence[int]]:
    return [(K, K), (), (K,), (K, K), (K, K), (K,)]


def _sums(delta: Delta) -> list[Tensor]:
    """One piece's Gram matrix, base norm, products with the base, and counts of signs."""
    K = len(delta.terms)
    active = [k for k, term in enumerate(delta.terms) if not isinstance(term, Untouched)]
    base = delta.base.flatten().float()
    taus = torch.stack([dense_term(delta.terms[k], delta.base).flatten().float() for k in active])
    signs = taus.sign()
    own = signs.abs()  # sums of at most a piece's 2^17 ones: exact in float32
    both, agreed = own @ own.T, signs @ signs.T

    def spread(small: Tensor) -> Tensor:
        result = torch.zeros([K] * small.dim(), dtype=torch.float64)
        result[torch.meshgrid(*[torch.tensor(active)] * small.dim(), indexing="ij")] = small.double()
        return result

    return [
        spread(taus @ taus.T),
        (base @ base).double(),
        spread(taus @ base),
        spread(both),
        spread((both - agreed) / 2),
        spread(taus.abs().sum(dim=1, dtype=torch.float64)),
    ]


def cached_geometry(task_vectors: TaskVectors, folder: Path, identity: str) -> Geometry:
    """As `measure_geometry`, cached in `folder` under a digest of `identity`."""
    file = cached(
        geometry_path(folder, identity), lambda path: save_geometry(measure_geometry(task_vectors), path)
    )
    return load_geometry(file.path)


def geometry_path(folder: Path, identity: str) -> Path:
    """The file that caches the geometry of these task vectors."""
    return folder / f"geometry-{digest(identity)}.safetensors"


FIELDS = ("gram", "base", "base_gram", "both", "opposed", "sizes")


def save_geometry(geometry: Geometry, path: Path) -> None:
    """Write it as safetensors, atomically."""
    tensors = {field: getattr(geometry, field) for field in FIELDS}
    specs = {field: (tensor.dtype, tuple(tensor.shape)) for field, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items(), {"names": json.dumps(geometry.names)})


def load_geometry(path: Path) -> Geometry:
    """Undo `save_geometry`. Raises ValueError for a damaged file, with the remedy."""
    file = open_cached(path)
    names = tuple(metadata_of(file, "names", FIELDS))
    return Geometry(names, *(file.read(f).clone() for f in FIELDS))
