"""One file of tensors, opened lazily: safetensors (`system.safetensors_file`) or torch's zip format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainmerge.system.safetensors_file import TensorInfo
from trainmerge.system.torch_file import check_state_dict, load_torch


class WeightFile(Protocol):
    """One file of tensors: its headers, and mapped reads."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> header, in file order."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped."""
        ...


class PickleFile:
    """A `.bin` file, opened by torch's restricted unpickler and mapped.

    Raises ValueError if it is not a plain dictionary of tensors in torch's zip format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = check_state_dict(load_torch(path, mmap=True), path)
        except ValueError as error:
            raise ValueError(
                f"{path}: torch cannot load it: {error}. Save it again as safetensors."
            ) from error
        self._state = state
        self.tensors = {name: TensorInfo(t.dtype, t.shape, path) for name, t in state.items()}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped."""
        return self._state[name]
