"""The folder of packed experts: `packed.json` and safetensors files, written one parameter at a time.

`u/NAME`, `s/NAME` and `b/NAME` are shared by all tasks, `m/TASK/NAME`, `t/...`, `U/...`, `V/...`, `z/...` and
`d/...` are one task's, `a/TASK` its scales in the order of `tensors`, and `h/TASK/NAME` its own head. See
`codec` for what they are.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.packed.codec import Codec, EncodedParameter, errors
from trainmerge.packed.parameter import Parameter
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.safetensors_format import file_order

FILE = "packed.safetensors"
SHARD = 1 << 30  # bytes that are held before they are written


class Shards:
    """Collects tensors, and writes a file whenever `SHARD` bytes are held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._made: list[str] = []  # SHA-256 of each file
        self.nbytes = 0  # of all tensors
        self._written = 0  # of those in files

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add these, under names that are new."""
        assert not self._held.keys() & tensors.keys()
        self._held |= tensors
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.nbytes - self._written >= SHARD:
            self._write()

    def _write(self) -> None:
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._held.items()}
        ordered = ((name, self._held[name]) for name in file_order(specs))
        hasher = hashlib.sha256()
        file = self._folder / f"{len(self._made)}.part"
        write_safetensors(file, specs, ordered, {"format": "pt"}, hasher)
        self._made.append(hasher.hexdigest())
        self._held, self._written = {}, self.nbytes

    def close(self) -> dict[str, str]:
        """Write the rest and give the files their names; file -> SHA-256."""
        self._write()
        total = len(self._made)
        names = [FILE] if total == 1 else [
            f"packed-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)
        ]  # fmt: skip
        for number, name in enumerate(names):
            (self._folder / f"{number}.part").rename(self._folder / name)
        return dict(zip(names, self._made, strict=True))


def named_parts(name: str, made: EncodedParameter, tasks: Iterable[str]) -> dict[str, Tensor]:
    """A parameter's parts by their names in the file."""
    found = {f"{kind}/{name}": tensor for kind, tensor in made.shared.items()}
    for task, own in zip(tasks, made.own, strict=True):
        found |= {f"{kind}/{task}/{name}": tensor for kind, tensor in own.items()}
    return found


def write_parameters(
    parameters: Sequence[Parameter],
    codecs: Mapping[str, Codec | None],
    tasks: Sequence[str],
    shards: Shards,
) -> tuple[Tensor, Tensor]:
    """Encode every parameter; returns their scales [parameters, K], and the tasks' squared errors [K].

    Raises:
        ValueError: a number that is not finite in the file's dtype.
    """
    scales = torch.zeros(len(parameters), len(tasks))
    lost = torch.zeros(len(tasks), dtype=torch.float64)
    for number, parameter in enumerate(parameters):
        codec = codecs[parameter.name]
        if codec is None:
            lost += parameter.squares()
            continue
        made = codec.encode(parameter)
        _check_finite(parameter.name, made)
        lost += errors(parameter, made)
        scales[number] = made.scales
        shards.add(named_parts(parameter.name, made, tasks))
    return scales, lost


def _check_finite(name: str, made: EncodedParameter) -> None:
    if not all(bool(part.isfinite().all()) for part in made.parts if part.is_floating_point()):
        raise ValueError(f"{name}: it is not finite when packed; try --dtype float32")
