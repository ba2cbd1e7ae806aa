"""Names of parts of parameters: one matrix per expert in the files, one parameter per layer in memory.

model.layers.0.mlp.experts.gate_up_proj[3,0:64]      rows 0 to 63 of expert 3
model.layers.0.mlp.experts.gate_up_proj[3,:,0:64].T  the same where the parameter is inputs x outputs
model.layers.0.mlp.experts.gate_up_proj[3,:,0::2].T  every other column of it
"""

from functools import cache

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


@cache  # each pass of a fit asks for every place
def _parsed(name: str) -> tuple[tuple[int | slice, ...], bool]:
    """The index of a place, and whether its last two dimensions are exchanged."""
    inside, _, turned = name.partition("[")[2].partition("]")
    index: list[int | slice] = []
    for part in inside.split(","):
        ends = [int(end) if end else None for end in part.split(":")]
        index.append(slice(*ends) if ":" in part else int(part))
    return tuple(index), bool(turned)
