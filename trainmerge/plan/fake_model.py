"""A model whose tensors have a shape and a device but no storage."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def make_fake(module: nn.Module, dtypes: Mapping[str, torch.dtype] | torch.dtype) -> dict[int, Tensor]:
    """Replace every parameter and buffer by a fake one on the CPU; tied ones stay tied.

    Returns the fake one of each former one, by its `id`.
    """
    made: dict[int, Tensor] = {}
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in made:
                full = f"{prefix}.{name}" if prefix else name
                dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(full, parameter.dtype)
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for buffer in part._buffers.values():
            if buffer is not None:
                made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = made[id(tensor)]  # type: ignore[assignment]
    return made


def make_rest_fake(module: nn.Module, made: Mapping[int, Tensor], dtype: torch.dtype) -> None:
    """The same for what an expert's class has beside the modules of the model."""
    done = {id(tensor) for tensor in made.values()}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None or id(tensor) in done:
                    continue
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                fake = made.get(id(tensor), torch.empty(tensor.shape, dtype=kind))
                frozen = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
                store[name] = made.get(id(tensor), frozen)  # type: ignore[assignment]
