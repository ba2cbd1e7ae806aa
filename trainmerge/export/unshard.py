"""A sharded checkpoint of torch.distributed (DCP) -> a folder of transformers, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from trainmerge.checkpoints import Checkpoint, open_checkpoint
from trainmerge.checkpoints.weight_files import SAFETENSORS
from trainmerge.export.form import write_dtype
from trainmerge.export.side_files import copy_base_files
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.sharded_file import ShardedFile
from trainmerge.system.staging import staging
from trainmerge.system.text import listed


def unshard(path: str | Path, out: str | Path, like: str | Path, *, key: str | None = None) -> Path:
    """Write a sharded checkpoint as a transformers folder, for a recipe; returns `out`.

    The tensors are those that `like` has, by its names, in the dtypes of the sharded checkpoint; optimiser
    states and everything else stay behind. Memory holds one tensor at a time. The metadata is a pickle, read
    by an unpickler that knows few classes: torch.distributed's own, sizes, dtypes and paths.

    Args:
        path: The folder with `.metadata` and `.distcp` files.
        out: The folder to create.
        like: A transformers folder of the same model, such as the base that was trained: its configuration
            and tokenizer are copied.
        key: What precedes the names, `model` say, if the checkpoint has the model more than once.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: damaged files; tensors that are missing, have other shapes, or come twice.
    """
    file, model = ShardedFile(Path(path)), open_checkpoint(Path(like))
    prefix = _prefix(file, model, key)
    names = {name: f"{prefix}{name}" for name in model.tensors}
    if wrong := [n for n, own in names.items() if file.entries[own].size != model.info(n).shape]:
        raise ValueError(f"{path}: other shapes than in {like}: {listed(wrong)}. Is it the same model?")
    specs = {
        name: (file.entries[own].properties.dtype, tuple(file.entries[own].size))
        for name, own in names.items()
    }
    with staging(out) as folder:
        copy_base_files(model, folder)
        if len(dtypes := {dtype for dtype, _ in specs.values()}) == 1:
            write_dtype(folder / "config.json", str(dtypes.pop()).removeprefix("torch."))
        write_safetensors(folder / SAFETENSORS, specs, _tensors(file, names), {"format": "pt"})
    return Path(out)


def _tensors(file: ShardedFile, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, file.read(own)) for name, own in names.items())


def _prefix(file: ShardedFile, model: Checkpoint, key: str | None) -> str:
    """What precedes the model's names in the sharded checkpoint.

    Raises:
        ValueError: no prefix gives all names, or several do.
    """
    first = next(iter(model.tensors))
    starts = [name.removesuffix(first) for name in file.entries if name.endswith(first)]
    if key is not None:
        starts = [start for start in starts if start == f"{key}."]
    whole = [start for start in starts if all(f"{start}{name}" in file.entries for name in model.tensors)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        keys = ", ".join(repr(start.removesuffix(".")) for start in whole)
        raise ValueError(f"{file.folder}: the model is there several times: choose one by key, of {keys}")
    missing = [name for name in model.tensors if not any(own.endswith(name) for own in file.entries)]
    lacking = listed(missing or [*model.tensors])
    raise ValueError(
        f"{file.folder}: not all tensors of {model.path} are in it: {lacking}. It has "
        f"{listed(list(file.entries))}"
    )
