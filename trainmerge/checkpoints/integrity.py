"""Whether files are unchanged and their tensors finite."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.side_modules import module_folders
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Term
from trainmerge.system.safetensors_file import sha256
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.parameter_names import matches

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "config.json", "adapter_config.json")
# Calibration depends on these, so a fit cannot be resumed with others; the weights of its merge do not.
TOKENIZER = (
    "*token*.json", "*.model", "vocab*", "merges*", "chat_template*", "*processor_config.json", "*.tiktoken",
)  # fmt: skip
READ = (*WEIGHTS, *TOKENIZER)
WORKERS = min(8, os.cpu_count() or 1)
Stamp = list[int]  # device, inode, size, mtime and ctime
T = TypeVar("T")


def fingerprint(path: str | Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's or adapter's weights, configuration and tokenizer, by file name.

    Also of modules after the model that have weights, by their path in the folder. Not of other files, such
    as generation_config.json: nothing learned depends on them.

    Raises FileNotFoundError if there is none.
    """
    files = _files(Path(path))
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(files, pool.map(sha256, files.values()), strict=True))


def same_weights(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints are of equal weights and configurations; other files are not compared.

    `one` is a run's.
    """
    return _named(one, WEIGHTS) == _named(_without_new(other, one), WEIGHTS)


def as_then(
    now: Mapping[str, Mapping[str, T]], recorded: Mapping[str, Mapping[str, T]]
) -> dict[str, dict[str, T]]:
    """Fingerprints or stamps, without files that the version that `recorded` others did not look at."""
    return {name: _without_new(files, recorded.get(name, {})) for name, files in now.items()}


def _without_new(files: Mapping[str, T], recorded: Mapping[str, T]) -> dict[str, T]:
    """Version 0.1.0 recorded no files of subfolders, where modules after the model are."""
    whole = any("/" in name for name in recorded)
    return {name: value for name, value in files.items() if whole or "/" not in name}


def as_recorded(
    found: Mapping[str, Mapping[str, str]], recorded: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Fingerprints as a run recorded them, where they agree: older versions recorded further files too."""
    return {
        name: dict(recorded[name] if _named(recorded.get(name, {}), READ) == of_then else found[name])
        for name, of_then in as_then(found, recorded).items()
    }


def _named(files: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """The entries of a fingerprint whose file names match."""
    return {name: digest for name, digest in files.items() if matches(name, patterns)}


def stamps(path: str | Path) -> dict[str, Stamp]:
    """The file system's stamps of the files that `fingerprint` reads; every change gives another stamp.

    The converse does not hold: a copied folder has other stamps and the same fingerprint.
    """
    return {name: list(_stamp(file.stat())) for name, file in _files(Path(path)).items()}


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _files(folder: Path) -> dict[str, Path]:
    files = sorted(file for file in folder.glob("*") if matches(file.name, READ) and file.is_file())
    if not files:
        raise FileNotFoundError(
            f"{folder}: no weights or configs in it. Name a checkpoint or adapter folder."
        )
    return {file.name: file for file in files} | _files_after(folder)


def _files_after(folder: Path) -> dict[str, Path]:
    """Weights and configurations of modules after the model that have weights, by their path."""
    weights = [
        file
        for place in module_folders(folder)
        for file in (folder / place).glob("*")
        if matches(file.name, WEIGHTS)
    ]
    homes = {file.parent for file in weights if file.suffix in (".safetensors", ".bin")}
    return {file.relative_to(folder).as_posix(): file for file in sorted(weights) if file.parent in homes}


def verify(
    base: Checkpoint, task_vectors: TaskVectors, folders: Mapping[str, Path]
) -> dict[str, dict[str, str]]:
    """Fingerprints of all folders; checks that every floating tensor of base and experts is finite.

    Folder by folder, so that each file is read from disk once if one model fits into the page cache.

    Args:
        base: All its tensors are checked, including those that no expert changed.
        task_vectors: Their terms are checked as stored in the files.
        folders: "base" and every expert.

    Raises:
        ValueError: lists every tensor with NaN or infinity, by expert and file.
    """
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for side, folder in folders.items():
        found[side] = fingerprint(folder)
        own = _of_base(base) if side == "base" else _of_expert(task_vectors, side, folder)
        problems += [f"  {what} has NaN or infinite values" for what in _not_finite(own)]
    if problems:
        lines = "\n".join(problems)
        count = "1 tensor is" if len(problems) == 1 else f"{len(problems)} tensors are"
        raise ValueError(f"{count} not finite; download or train again:\n{lines}")
    return found


def _of_base(base: Checkpoint) -> dict[str, Tensor]:
    return {
        f"base: {name} of {info.file}": base.read(name)
        for name in [*base.tensors, *base.side]
        if (info := base.info(name)).dtype.is_floating_point
    }


def _of_expert(task_vectors: TaskVectors, expert: str, folder: Path) -> dict[str, Tensor]:
    k = task_vectors.experts.index(expert)
    return {
        f"{expert}: {name}{part} of {folder}": tensor
        for name, delta in task_vectors.deltas.items()
        for part, tensor in _tensors(delta.terms[k]).items()
    }


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    with ThreadPoolExecutor(WORKERS) as pool:
        finite = pool.map(_finite, tensors.values())
        return [what for what, sound in zip(tensors, finite, strict=True) if not sound]


def _tensors(term: Term) -> dict[str, Tensor]:
    match term:
        case ExpertWeight(weight):
            return {"": weight}
        case Difference(tau):
            return {"": tau}
        case LowRank(up, down, _):
            return {" (B)": up, " (A)": down}
        case _:
            return {}


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # no temporaries: NaN propagates, infinities are extremes
    return bool(torch.isfinite(low) & torch.isfinite(high))
