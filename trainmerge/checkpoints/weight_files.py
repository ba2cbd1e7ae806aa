"""Which files of a folder are its weights: one set, or an error that names the others.

Training again into a folder, merging an adapter where it lies and downloading over an older copy leave two
generations of weights in one folder. transformers takes one without a word.
"""

import re
import warnings
from pathlib import Path, PureWindowsPath
from typing import Any

from trainmerge.checkpoints.side_modules import MODULES, read_modules
from trainmerge.system.hub import origin_of
from trainmerge.system.json_file import read_json
from trainmerge.system.links import check_link
from trainmerge.system.text import listed, shortened

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
ADAPTER = "adapter_config.json"
SHARD = re.compile(r"-\d+-of-\d+\.")
LONGEST = 255  # characters of a file's name
LONG = 2000  # characters of an error about many files
SHOWN = 3  # files that a message lists by name


def check_one_generation(path: Path) -> None:
    """Raise ValueError if a folder contains both an adapter and a whole model."""
    whole = [name for single in (SAFETENSORS, PICKLE) for name in _forms(single) if (path / name).is_file()]
    if (path / ADAPTER).is_file() and whole:
        raise ValueError(
            f"{path}: contains both an adapter ({ADAPTER}) and a whole model ({listed(whole, SHOWN)}): which "
            "of them is meant? Move the files of one to another folder: adapter_* for the adapter, "
            "config.json and the weights for the model"
        )


def _check_one_set(path: Path, single: str) -> None:
    """Raise ValueError if there are both a single file and shards, in one format."""
    index = path / f"{single}.index.json"
    if not (path / single).is_file() or not index.is_file():
        return
    named = read_folder_json(index).get("weight_map")
    shards = {str(file) for file in named.values()} - {single} if isinstance(named, dict) else set()
    if any((path / file).is_file() for file in shards):  # an index without its shards is not weights
        raise ValueError(
            f"{path}: two sets of weights, {single} and the shards of {index.name}: transformers would take "
            f"{single}. Remove it, or remove {index.name} and its shards, whichever is the older"
        )


def _forms(single: str) -> tuple[str, str]:
    return single, f"{single}.index.json"


def _warn_of_others(path: Path, taken: list[Path], safe: str, pickled: str) -> None:
    """Warn of further weights of the same name that are not read."""
    names = {file.name for file in taken}
    stems = tuple(Path(single).stem for single in (safe, pickled))
    others = [
        file.name
        for file in sorted(path.glob("*"))
        if file.name not in names
        and (file.name in (safe, pickled) or (file.name.startswith(stems) and SHARD.search(file.name)))
    ]
    if others:
        warnings.warn(
            f"{path}: {listed(sorted(names), SHOWN)} is read, as transformers does; {listed(others, SHOWN)} "
            "is not. If that is the newer copy of the weights, move the other away",
            stacklevel=3,
        )


def read_folder_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder. Raises FileNotFoundError or ValueError that names the file."""
    if not path.is_file():
        more = _of_modules(path.parent)
        raise FileNotFoundError(
            f"{path}: no such file; {path.parent} is not a complete checkpoint folder.{more}"
        )
    check_link(path.parent, path)
    return read_json(path, "Download or save it again.")


def _of_modules(folder: Path) -> str:
    """What a folder of sentence-transformers is, if its model is not at its top; else nothing."""
    if not (folder / MODULES).is_file():
        return ""
    kinds = [f"{module.kind} in {module.place or 'the folder'}" for module in read_modules(folder)]
    return shortened(
        f" Its {MODULES} lists {', '.join(kinds)}: the files of one Transformer must be in the folder "
        "itself, and its path in the list empty",
        600,
    )


def find_weights(
    path: Path, safe: str, pickled: str, allow_pickle: bool
) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of `path`, and the index's tensor -> file name where there is one.

    transformers' order: the single safetensors file, its shards, then the pickled forms. Warns of files that
    are left out: they may be another generation of the weights.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a single file and shards of the same format, only pickled ones without permission, an
            unusable index, or a link of pickled weights that leads outside.
    """
    _check_one_set(path, safe)
    for single in [safe, pickled]:
        if single == pickled:
            _check_one_set(path, pickled)
        if single == pickled and _has(path, pickled) and not allow_pickle:
            raise ValueError(
                f"{path}: only pickled weights ({pickled}), which can run code. Save them as safetensors, "
                "or set allow_pickle if you trust their source."
            )
        if (path / single).is_file():
            _check_weights_link(path, path / single)
            _warn_of_others(path, [path / single], safe, pickled)
            return [path / single], None
        index = path / f"{single}.index.json"
        if index.is_file():
            names = _weight_map(index, Path(single).suffix)
            files = [path / file for file in sorted(set(names.values()))]
            for file in files:
                _check_weights_link(path, file)
            _warn_of_others(path, files, safe, pickled)
            return files, names
    dangling = [path / single for single in (safe, pickled) if (path / single).is_symlink()]
    pickled_only = " From the hub, pickled ones come with allow_pickle only." if origin_of(path) else ""
    gone = [f"; {link.name} is a link to {link.readlink()}, which does not exist" for link in dangling]
    raise FileNotFoundError(
        f"{path}: no weights: neither {safe} nor {safe}.index.json exists{''.join(gone)}. Check the path, "
        f"or download them again.{pickled_only}"
    )


def _check_weights_link(folder: Path, file: Path) -> None:
    """Raise ValueError if a file of pickled weights is a link that leads outside.

    A safetensors file may lie anywhere, as in a farm of links: what is not one is refused when it is opened,
    and an export has its tensors only, never the file.
    """
    if file.suffix != Path(SAFETENSORS).suffix:
        check_link(folder, file)


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file() or (path / f"{name}.index.json").is_file()


def _weight_map(index: Path, suffix: str) -> dict[str, str]:
    """The index's tensor -> file name. Untrusted input: only plain relative `.safetensors` paths."""
    names = read_folder_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index}: no usable 'weight_map' (tensor name -> file name). Download it again.")
    problems = []
    for file in sorted(set(names.values())):
        # PureWindowsPath parses both kinds of slashes and drives, on any system.
        parts = PureWindowsPath(file)
        outside = parts.drive or parts.root or ".." in parts.parts
        if outside or not file.endswith(suffix) or any(len(part) > LONGEST for part in parts.parts):
            problems.append(f"{shortened(repr(file), LONGEST)} is not a {suffix} file inside the folder")
        elif not (index.parent / file).is_file():
            problems.append(f"{file} is missing, with {sum(f == file for f in names.values())} tensors")
    if problems:
        missing = all("is missing" in problem for problem in problems)
        kind = FileNotFoundError if missing else ValueError
        words = shortened("; ".join(problems), LONG)
        raise kind(f"{index}: {words}. Download the checkpoint again, from a source you trust.")
    return names
