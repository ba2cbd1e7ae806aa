"""Names of parts of parameters: one matrix per expert in the files, one parameter per layer in memory.

model.layers.0.mlp.experts.gate_up_proj[3,0:64]      rows 0 to 63 of expert 3
model.layers.0.mlp.experts.gate_up_proj[3,:,0:64].T  the same where the parameter is inputs x outputs
model.layers.0.mlp.experts.gate_up_proj[3,:,0::2].T  every other column of it
"""

from functools import cache

import torch
from torch import Tensor


def parameter_of(name: str) -> str:
    """The parameter of a place's name, or the parameter's own."""
    return name.partition("[")[0]


def is_place(name: str) -> bool:
    """Whether a name is of a part of a parameter."""
    return "[" in name


def view(name: str, tensor: Tensor) -> Tensor:
    """The part of a parameter's tensor, or of its gradient, that a name in memory stands for: a view.

    >>> import torch
    >>> view("w[1,0:2].T", torch.arange(12).view(2, 3, 2)).tolist()
    [[6, 8], [7, 9]]
    """
    if not is_place(name):
        return tensor
    index, turned = _parsed(name)
    found = tensor[index]
    return found.mT if turned else found


def rows_within(name: str, shape: tuple[int, ...], rows: slice) -> tuple[slice, int, str]:
    """What of a place lies in `rows` of its parameter: its own rows, of how many, and their place there.

    The last is empty if nothing does.

    Args:
        name: The place.
        shape: The parameter's.
        rows: Rows of the parameter, as first and last + 1.

    Raises:
        ValueError: a place whose rows are columns of the parameter.

    >>> rows_within("w[3,0:64]", (4, 96, 8), slice(2, 4))
    (slice(0, 64, None), 64, 'w[1,0:64]')
    >>> rows_within("w[3,0:64]", (4, 96, 8), slice(0, 2))
    (slice(0, 0, None), 64, '')
    >>> rows_within("w[:].T", (4, 96, 8), slice(2, 4))
    (slice(2, 4, None), 4, 'w[0:2].T')
    """
    whole = view(name, torch.empty(shape, device="meta"))
    index, turned = _parsed(name)
    first, count = index[0], whole.shape[0]
    if isinstance(first, int):
        inside = rows.start <= first < rows.stop
        return (slice(0, count), count, _moved(name, f"{first - rows.start}")) if inside else _none(count)
    if (turned and whole.dim() == 2) or first.step not in (None, 1):
        raise ValueError(f"{name}: its rows are no rows of the parameter, so it cannot be sharded by rows")
    begin = first.start or 0
    low, high = max(begin, rows.start), min(begin + count, rows.stop)
    there = _moved(name, f"{low - rows.start}:{high - rows.start}")
    return (slice(low - begin, high - begin), count, there) if low < high else _none(count)


def _none(count: int) -> tuple[slice, int, str]:
    return slice(0, 0), count, ""


def _moved(name: str, first: str) -> str:
    """A place's name with another index of the first dimension."""
    parameter, _, rest = name.partition("[")
    inside, _, turned = rest.partition("]")
    return f"{parameter}[{','.join([first, *inside.split(',')[1:]])}]{turned}"


@cache  # each pass of a fit asks for every place
def _parsed(name: str) -> tuple[tuple[int | slice, ...], bool]:
    """The index of a place, and whether its last two dimensions are exchanged."""
    inside, _, turned = name.partition("[")[2].partition("]")
    index: list[int | slice] = []
    for part in inside.split(","):
        ends = [int(end) if end else None for end in part.split(":")]
        index.append(slice(*ends) if ":" in part else int(part))
    return tuple(index), bool(turned)
