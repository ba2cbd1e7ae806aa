"""A checkpoint's parameters: all mergeable tensors, under one name each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trainmerge.checkpoints.meta_model import build_meta_model
from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.tensor_names import canonical_names, locate, memory_names, tied_names
from trainmerge.task_vectors.parameter_names import matches

MERGED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Parameters:
    """A checkpoint, its meta model, and the tensor of the files of each parameter.

    Buffers and integers are in no map: they are never merged. `ignored` parameters are in `names` only.
    """

    checkpoint: Checkpoint
    meta_model: PreTrainedModel
    names: Mapping[str, str]  # every tensor of the files -> parameter; tied ones share one
    files: Mapping[str, str]  # parameter -> its canonical tensor of the files, `ignore`d ones left out

    @property
    def tied(self) -> dict[str, str]:
        """Tensor of the files -> the tensor that config.json ties it to, if the files have both."""
        return tied_names(self.names)

    @property
    def buffers(self) -> dict[str, str]:
        """Buffer of the model -> its tensor of the files, for those that the files have."""
        known = {name for name, _ in self.meta_model.named_buffers()}
        inside = memory_names(self.meta_model, self.checkpoint.tensors)
        return {buffer: name for name, buffer in inside.items() if buffer in known}

    def file_of(self, name: str) -> str | None:
        """The canonical tensor of a parameter by any of its names in memory; None if it is ignored."""
        wanted = dict(self.meta_model.named_parameters(remove_duplicate=False)).get(name)
        owners = {id(parameter): owner for owner, parameter in self.meta_model.named_parameters()}
        return self.files.get(owners.get(id(wanted), name))

    def duplicates(self) -> dict[str, list[str]]:
        """Canonical tensor -> the other tensors of the files that are tied to it."""
        others: dict[str, list[str]] = {}
        for name, parameter in self.names.items():
            canonical = self.files.get(parameter, name)
            if canonical != name:
                others.setdefault(canonical, []).append(name)
        return others


def open_parameters(checkpoint: Checkpoint, ignore: Sequence[str] = ()) -> Parameters:
    """Name the parameters of a checkpoint, from headers and config.json alone.

    Raises ValueError if it is quantised, or its names, shapes and config.json do not agree.
    """
    narrow = [name for name, info in checkpoint.tensors.items() if _quantised(info.dtype)]
    if narrow or checkpoint.config.get("quantization_config") is not None:
        raise ValueError(
            f"{checkpoint.path}: quantised weights ({', '.join(narrow[:3]) or 'quantization_config'}) cannot "
            "be merged. Use the float checkpoint that was quantised."
        )
    meta_model = build_meta_model(checkpoint.path)
    _check_floats(checkpoint, meta_model)
    names = locate(meta_model, checkpoint.path, checkpoint.tensors, ignore)
    files = canonical_names(
        {n: p for n, p in names.items() if not matches(n, ignore) and not matches(p, ignore)}
    )
    return Parameters(checkpoint, meta_model, names, files)


def _quantised(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype not in MERGED_DTYPES


def _check_floats(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> None:
    """Raise ValueError for integers, or other tensors that are no floats, where the model has parameters."""
    parameters = dict(meta_model.named_parameters(remove_duplicate=False))
    prefix = f"{meta_model.base_model_prefix}."
    for name, info in checkpoint.tensors.items():
        names = {name, f"{prefix}{name}", name.removeprefix(prefix)}
        if not info.dtype.is_floating_point and not names.isdisjoint(parameters):
            raise ValueError(
                f"{info.file}: {name} is {info.dtype}, where the model has floats: quantised weights cannot "
                "be merged. Use the float checkpoint that was quantised."
            )


def fit_prefix(names: Iterable[str], known: Iterable[str], prefixes: Iterable[str]) -> dict[str, str]:
    """`names` matched to `known` by a prefix added to all, or removed from all, whichever matches most.

    >>> fit_prefix(["bert.encoder.a", "classifier.b"], ["encoder.a"], ["bert"])
    {'bert.encoder.a': 'encoder.a', 'classifier.b': 'classifier.b'}
    """
    names, known = list(names), set(known)
    ways = [{name: name for name in names}]
    for prefix in prefixes:
        ways.append({name: f"{prefix}.{name}" for name in names})
        ways.append({name: name.removeprefix(f"{prefix}.") for name in names})
    return max(ways, key=lambda way: sum(name in known for name in way.values()))
