"""A state dict from disk: safetensors, torch.save, sharded checkpoints, folders of timm and diffusers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainmerge.checkpoints.foreign import DIFFUSERS, recognise
from trainmerge.checkpoints.weight_files import ADAPTER, find_weights
from trainmerge.system.atomic import seen_from
from trainmerge.system.safetensors_file import MappedFile
from trainmerge.system.text import listed
from trainmerge.system.torch_file import METADATA, check_tensors, load_torch

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "params", "params_ema",
            "state_dict_ema", "model_ema", "ema")  # fmt: skip


def load_state_dict(
    path: str | Path, *, key: str | None = None, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder of timm or diffusers, by name; mapped, so nothing is read yet.

    Args:
        path: A `.safetensors` file; a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`) with a state
            dict, alone or under a key such as `state_dict` (Lightning) or `model`; a component's folder of
            diffusers; a folder of timm; a folder with `consolidated.safetensors`; a folder of
            torch.distributed (`.metadata` and `.distcp`), which is read into memory.
        key: The key of the state dict in a file that has several.
        allow_pickle: Read files of `torch.save` too, by torch's restricted unpickler. Use it for files that
            you trust.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format (the text says which, and how to convert it), a damaged file, a pickled
            one without permission, or several state dicts without `key`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder{seen_from(path)}")
    found = recognise(path)
    if found is None:
        raise ValueError(f"{path}: {_other(path)}")
    if not found.files:
        raise ValueError(f"{path}: {found.what}. {found.remedy}.")
    (file,) = found.files
    if file.name == METADATA:
        return _sharded(path, key, allow_pickle)
    if path.is_dir() and file.name.startswith(DIFFUSERS):
        files, _ = find_weights(path, f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.bin", allow_pickle)
    else:
        files = [file]
    return {name: t for file in files for name, t in _read(file, key, allow_pickle).items()}


def _other(path: Path) -> str:
    """Why a path that is recognised as nothing cannot be read."""
    if path.is_file():
        return "not a file of weights that is known here: give a .safetensors file or one of torch.save"
    if (path / ADAPTER).is_file():
        return "a peft adapter, which has no weights of its own: give it to tm.Recipe, with its base"
    if (path / "config.json").is_file():
        return "a transformers folder: give it to tm.Recipe, which knows its ties and its configuration"
    return "no weights that are known here. Give a file, or a folder of timm or diffusers"


def _read(file: Path, key: str | None, allow_pickle: bool) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        if key is not None:
            raise ValueError(f"{file}: a safetensors file has one state dict only: leave out key={key!r}")
        mapped = MappedFile(file)
        return {name: mapped.read(name) for name in mapped.tensors}
    if not allow_pickle:
        raise ValueError(
            f"{file}: a pickled file, which can run code. Save its tensors as safetensors, or set "
            "allow_pickle if you trust its source: torch's restricted unpickler reads it."
        )
    try:
        return check_tensors(_unwrapped(load_torch(file, mmap=True), key), file)
    except ValueError as error:
        raise ValueError(
            f"{file}: no state dict: {error}. Load it where it was made, and save module.state_dict()"
        ) from error


def _sharded(folder: Path, key: str | None, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise ValueError(
            f"{folder}: its {METADATA} is a pickled file, which can run code. Set allow_pickle if you trust "
            "its source: an unpickler reads it that knows torch.distributed's classes only."
        )
    from trainmerge.system.sharded_file import ShardedFile  # with torch.distributed's: half a second

    file = ShardedFile(folder)
    firsts = list(dict.fromkeys(path[0] for path in file.paths.values() if len(path) > 1))
    inside = [first for first in firsts if first in WRAPPERS]
    if key is not None and key not in firsts:
        raise ValueError(f"{folder}: it has no key {key!r}; its keys are {listed(firsts, 12)}")
    if key is None and len(inside) > 1:
        words = f"it has several, under {', '.join(inside)}: choose one by key={inside[0]!r}"
        raise ValueError(f"{folder}: no state dict: {words}")
    return {within: file.read(name) for within, name in file.under(key or (inside or [""])[0])}


def _unwrapped(content: Any, key: str | None) -> Any:
    """The state dict within what was saved.

    Raises:
        ValueError: it is under several keys, or not under `key`.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"the file has one {type(content).__name__}")
    inside = [k for k, value in content.items() if k in WRAPPERS and _is_state(value)]
    if key is not None:
        if key not in content:
            raise ValueError(f"it has no key {key!r}; its keys are {listed([str(k) for k in content], 12)}")
        return content[key]
    if len(inside) > 1:
        raise ValueError(f"it has several, under {', '.join(inside)}: choose one by key={inside[0]!r}")
    others = [str(k) for k, value in content.items() if _is_state(value)]
    if not inside and others:
        raise ValueError(f"its tensors are under {listed(others)}: choose by key={others[0]!r}")
    return content[inside[0]] if inside else content


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())
