"""The running statistics of batch norms, estimated again on calibration data.

A merge's activations are those of none of its experts, so no average of their statistics is its own
(Jordan et al., REPAIR, ICLR 2023, arXiv 2211.08403, section 4 resets them the same way).

Legend: `F` features of a batch norm.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Forward = Callable[[nn.Module, Any], Any]  # a module and a batch of one's own loader -> its outputs


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm that has running statistics, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    }


def call(module: nn.Module, batch: Any) -> Any:
    """The default forward, on the module's device.

    A mapping is passed by keywords, of a tuple or list the first entry (labels are not read), anything else
    as it is.
    """
    device = next(module.parameters()).device
    if isinstance(batch, Mapping):
        return module(**{name: _moved(value, device) for name, value in batch.items()})
    return module(_moved(batch[0] if isinstance(batch, tuple | list) else batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def batch_norm_statistics(
    module: nn.Module, batches: Iterable[Any], forward: Forward = call
) -> dict[str, Tensor]:
    """New running means and variances [F] of every batch norm, as entries of a state dict.

    They are the mean over batches of each batch's statistics (`momentum=None`), every batch counting the
    same; all other layers are in evaluation mode. The module is as it was afterwards: load the result with
    `module.load_state_dict(statistics, strict=False)`.

    Raises:
        ValueError: there is no batch norm, or no batch.
    """
    norms = batch_norms(module)
    if not norms:
        raise ValueError("the module has no batch norm with running statistics: leave out the re-estimation")
    with _measuring(module, norms):
        count = 0
        for batch in batches:
            forward(module, batch)
            count += 1
        if not count:
            raise ValueError("no batches to estimate the batch norms' statistics on")
        return {
            f"{name}.{key}" if name else key: value.clone()
            for name, norm in norms.items()
            for key, value in norm.named_buffers(recurse=False)
        }


@contextmanager
def _measuring(module: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """In this context batch norms measure from anew; then modes, momentum and statistics are restored."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = {name: norm.momentum for name, norm in norms.items()}
    before = {
        name: {key: value.clone() for key, value in norm.named_buffers(recurse=False)}
        for name, norm in norms.items()
    }
    module.eval()
    for norm in norms.values():
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            for key, value in norm.named_buffers(recurse=False):
                value.copy_(before[name][key])
