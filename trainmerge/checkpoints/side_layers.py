"""The layers of modules after the model, as children of the model itself: `module.get_submodule("2_Dense")`.

So their parameters are the model's own, and whatever reads or writes a model's parameters has them too. The
model's forward does not call them; `trainmerge.model.embedding` does.
"""

import torch
from torch import Tensor, nn

from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.side_modules import layer_name, side_folder


class SideLayer(nn.Module):
    """The layer of one module after the model, under the name that its file has: `linear` or `norm`."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name = name
        layer: nn.Module
        if name == "linear":
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        else:
            layer = nn.LayerNorm(tuple(weight.shape), bias=bias is not None, device="meta")
        for own, parameter in {"weight": weight, "bias": bias}.items():
            if parameter is not None:
                setattr(layer, own, nn.Parameter(parameter, requires_grad=False))
        self.add_module(name, layer)

    def forward(self, rows: Tensor) -> Tensor:
        """The layer's output [..., E] of its inputs [..., D]."""
        layer: nn.Module = getattr(self, self.name)
        out: Tensor = layer(rows)
        return out


@torch.no_grad()
def attach_side_layers(
    module: nn.Module, base: Checkpoint, device: torch.device | str = "cpu"
) -> dict[str, str]:
    """Add the base's layers after the model to `module`, in private memory of the files' dtypes.

    Returns tensor of the files -> parameter, for all of them.
    """
    names: dict[str, str] = {}
    for tensors in _by_module(base):
        inside = layer_name(tensors[0])
        copies = {base.side[name].name.partition(".")[2]: _copy(base.read(name), device) for name in tensors}
        layer = base.side[tensors[0]].name.split(".")[0]
        module.add_module(inside, SideLayer(layer, copies["weight"], copies.get("bias")))
        names |= {name: f"{inside}.{base.side[name].name}" for name in tensors}
    return names


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_like(tensor, device=device).copy_(tensor)


def _by_module(base: Checkpoint) -> list[list[str]]:
    places: dict[str, list[str]] = {}
    for name in base.side:
        places.setdefault(side_folder(name), []).append(name)
    return list(places.values())
