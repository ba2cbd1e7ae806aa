"""Whether the files are what they were, and their numbers finite."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Term
from trainmerge.storage import sha256
from trainmerge.task_vectors import TaskVectors

WEIGHTS = (".safetensors", ".bin", ".json")
WORKERS = min(8, os.cpu_count() or 1)
Stamp = list[int]  # device, inode, size, and the times of the last change of contents and of all else


def fingerprint(path: str | Path) -> dict[str, str]:
    """SHA-256 of every weight and config file of a checkpoint or adapter folder, by file name.

    Raises FileNotFoundError if there is none.
    """
    files = _files(Path(path))
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip([file.name for file in files], pool.map(sha256, files), strict=True))


def stamps(path: str | Path) -> dict[str, Stamp]:
    """What the file system says of the files that `fingerprint` reads: another stamp after every change.

    The converse does not hold: a copied folder has other stamps and the same fingerprint.
    """
    return {file.name: list(_stamp(file.stat())) for file in _files(Path(path))}


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix in WEIGHTS and file.is_file())
    if not files:
        raise FileNotFoundError(
            f"{folder}: no weights or configs there. Name a checkpoint or adapter folder."
        )
    return files


def check_finite(
    base: Checkpoint,
    task_vectors: TaskVectors,
    *,
    experts: Mapping[str, str | Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read every floating tensor of base and experts once, in place.

    Args:
        base: Its tensors are all read, those that no expert changed too.
        task_vectors: Their terms are read as they lie in the files.
        experts: Expert -> its folder, for the error to name.
        progress: Called with the bytes read so far and in all.

    Raises:
        ValueError: every NaN or infinity, by expert, tensor and file.
    """
    tensors = [
        (f"base: {name} of {info.file}", base.read(name))
        for name, info in base.tensors.items()
        if info.dtype.is_floating_point
    ]
    folders = {expert: f" of {folder}" for expert, folder in (experts or {}).items()}
    for name, delta in task_vectors.deltas.items():
        for expert, term in zip(task_vectors.experts, delta.terms, strict=True):
            tensors += [(f"{expert}: {name}{folders.get(expert, '')}", tensor) for tensor in _tensors(term)]
    total, done = sum(tensor.nbytes for _, tensor in tensors), 0
    problems = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for (what, tensor), finite in zip(tensors, pool.map(_finite, [t for _, t in tensors]), strict=True):
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
            if not finite:
                problems.append(f"  {what} has NaN or infinite values")
    if problems:
        lines = "\n".join(problems)
        raise ValueError(f"{len(problems)} tensors are not finite; download or train them again:\n{lines}")


def _tensors(term: Term) -> tuple[Tensor, ...]:
    match term:
        case ExpertWeight(weight):
            return (weight,)
        case Difference(tau):
            return (tau,)
        case LowRank(up, down, _):
            return (up, down)
        case _:
            return ()


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # no temporaries; NaN spreads, infinities are extremes
    return bool(torch.isfinite(low) & torch.isfinite(high))
