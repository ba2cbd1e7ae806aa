"""The parameter, or place in one, of each tensor in a checkpoint's files.

transformers renames, fuses and ties tensors on loading. So names, shapes and ties are compared with the meta
model before a weight is read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from re import search

from transformers import PreTrainedModel

from trainmerge.checkpoints.meta_model import build_meta_model, shorten
from trainmerge.checkpoints.mismatch import mismatch
from trainmerge.checkpoints.places import REORDERED, names_in_memory, shape_in, uncovered
from trainmerge.system.safetensors_file import TensorInfo
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.places import is_place, parameter_of

RENAMED = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm in files of the first BERTs


def locate(
    module: PreTrainedModel, path: Path, tensors: Mapping[str, TensorInfo], ignore: Sequence[str] = ()
) -> dict[str, str]:
    """Tensor of the files -> parameter or place. Tied tensors have the same one; buffers are left out.

    Raises ValueError for floating tensors that are neither parameter nor buffer, and for shape mismatches.
    """
    memory = memory_names(module, tensors)
    owners = _owners(module)
    in_model = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    obsolete = sorted(module._keys_to_ignore_on_load_unexpected or ())  # old buffers, transformers' own list
    unknown, shapes = [], []
    for name, inside in memory.items():
        if parameter_of(inside) not in in_model:
            if not matches(name, ignore) and not any(search(pattern, name) for pattern in obsolete):
                unknown.append(name)
        elif (want := shape_in(inside, in_model)) != (got := tuple(tensors[name].shape)):
            shapes.append(f"{name} is {got}, config.json makes it {want or 'something else'}")
    if unknown or shapes:
        raise ValueError(mismatch(path, type(module).__name__, unknown, shapes))
    if lost := uncovered(module, memory.values()):
        raise ValueError(
            f"{path}: the files do not fill {len(lost)} parameters exactly: {shorten(lost)}. An expert's "
            "matrix is missing or there twice, or config.json makes it larger: download the checkpoint again."
        )
    return _owned(memory, owners)


def canonical_names(names: Mapping[str, str]) -> dict[str, str]:
    """Parameter -> its one tensor of the files, from `locate`'s map.

    Among tied tensors it is the one that transformers calls the source; files may omit that one.
    """
    files: dict[str, str] = {}
    for name, parameter in names.items():
        if parameter not in files or f".{parameter}".endswith(f".{name}"):
            files[parameter] = name
    return files


def tied_names(names: Mapping[str, str]) -> dict[str, str]:
    """Tensor of the files -> the one that it must equal, if the files have both; from `locate`'s map."""
    files = canonical_names(names)
    return {name: files[parameter] for name, parameter in names.items() if files[parameter] != name}


def ties_of(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """`tied_names` of a checkpoint's files."""
    module = build_meta_model(path)
    owners = _owners(module)
    return tied_names(_owned(memory_names(module, tensors), owners))


def _owned(memory: Mapping[str, str], owners: Mapping[str, str]) -> dict[str, str]:
    """The tensors that are parameters, or in one, by the first name of a tied one."""
    return {
        name: owners[parameter_of(inside)] + inside.removeprefix(parameter_of(inside))
        for name, inside in memory.items()
        if parameter_of(inside) in owners
    }


def _owners(module: PreTrainedModel) -> dict[str, str]:
    """Every name of a parameter in memory -> its first name; tied parameters are one object."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}


def memory_names(module: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Each floating tensor's name in memory, or its place (`places`).

    With the model's own prefix (`bert.`) added to all, removed from all, or unchanged, or as transformers
    renames them on loading (vision-language models): whichever matches most.
    """
    names = [name for name, info in tensors.items() if info.dtype.is_floating_point]
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers()}
    prefix = module.base_model_prefix
    placed = names_in_memory(module, names, tensors)
    if any(inside.endswith(REORDERED) for inside in placed.values()):
        return placed  # under any other name such a tensor would be taken as it is
    ways = [
        *([placed] if any(is_place(inside) for inside in placed.values()) else []),
        {name: _modern(name, known) for name in names},
        {name: _modern(f"{prefix}.{name}", known) for name in names},
        {name: _modern(name.removeprefix(f"{prefix}."), known) for name in names},
        placed,
    ]
    return max(ways, key=lambda way: sum(parameter_of(name) in known for name in way.values()))


def _modern(name: str, known: set[str]) -> str:
    for old, new in RENAMED.items():
        if name not in known and name.endswith(old):
            return name.removesuffix(old) + new
    return name
