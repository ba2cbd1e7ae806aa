"""The coefficients over the steps of a fit, on disk: about a megabyte at most, however long the fit.

The file is raw records, each a step (int64) and the coefficients after it (K x G float32); the shape comes
from `coefficients.safetensors`. Step s is recorded if it is a multiple of the stride, the smallest power of
two that leaves few enough records up to the run's last step. So the file depends only on the last step, not
on interruptions.

Legend: `K` experts, `G` coefficient groups.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainmerge.system.atomic import write_whole_bytes
from trainmerge.system.disk_space import naming

FEWEST, MOST = 16, 128  # records
NUMBERS = 1 << 18  # in all records together, if that leaves at least `FEWEST`


class Trajectory(NamedTuple):
    """Coefficients at some steps; step 0 is the start."""

    steps: Tensor  # [S] int64
    values: Tensor  # [S, K, G] float32


def capacity(numbers: int) -> int:
    """The maximal number of records of `numbers` coefficients."""
    return min(MOST, max(FEWEST, NUMBERS // numbers))


def stride(step: int, numbers: int) -> int:
    """The stride of a run at `step`.

    >>> [stride(step, numbers=1) for step in (0, 127, 128, 1000)]
    [1, 1, 2, 8]
    """
    result = 1
    while step // result >= capacity(numbers):
        result *= 2
    return result


def read_trajectory(path: Path, experts: int, groups: int) -> Trajectory | None:
    """The complete records of a file; None if it does not exist or has none."""
    kind = record_of(experts, groups)
    if not path.is_file() or path.stat().st_size < kind.itemsize:
        return None
    records = np.fromfile(path, kind, count=path.stat().st_size // kind.itemsize)
    return Trajectory(
        torch.from_numpy(records["step"].copy()), torch.from_numpy(records["values"].astype("f4"))
    )


def record_of(experts: int, groups: int) -> np.dtype[np.void]:
    """The bytes of one record: a step and its coefficients."""
    return np.dtype([("step", "<i8"), ("values", "<f4", (experts, groups))])


def thin(path: Path, last: int, shape: tuple[int, int], every: int = 0) -> None:
    """Keep only the records [K, G] of a run of `last` steps; drops an incomplete record too.

    `every` is the stride, that of `last` by default.
    """
    if last == 0:
        path.unlink(missing_ok=True)
    if not path.exists():
        return
    kind = record_of(*shape)
    records = np.fromfile(path, kind, count=path.stat().st_size // kind.itemsize)
    every = every or stride(last, shape[0] * shape[1])
    kept = records[(records["step"] <= last) & (records["step"] % every == 0)]
    write_whole_bytes(path, kept.tobytes())


def append(path: Path, step: int, values: Tensor) -> None:
    """Append the coefficients [K, G] after a step, thinning the records if there are too many."""
    experts, groups = values.shape
    now, before = stride(step, values.numel()), stride(max(0, step - 1), values.numel())
    if now > before:
        thin(path, step - 1, (experts, groups), every=now)
    if step % now:
        return
    record = np.zeros(1, record_of(experts, groups))
    record["step"], record["values"] = step, values.detach().float().cpu().numpy()
    with naming(path), path.open("ab", buffering=0) as file:
        file.write(record.tobytes())
