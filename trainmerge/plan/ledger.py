"""Count the bytes of live tensors and their operations, for real or fake tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from trainmerge.plan.grouped_products import GROUPED, grouped_flops, grouped_product

aten = torch.ops.aten
# torch does not count the CPU's attention kernels; they compute the same products as a GPU's.
ATTENTION, SLOPE = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward
SAME_PRODUCTS = {
    aten._scaled_dot_product_flash_attention_for_cpu: ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: SLOPE,
}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that live tensors would have, and the operations that computed them."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {weight.untyped_storage()._cdata: 0 for weight in weights}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet == aten.nonzero:
            result: Any = _places(args[0])
        elif packet == GROUPED and isinstance(args[0], FakeTensor):
            result = grouped_product(args, kwargs)
        else:
            if packet in (aten.index, aten.index_put, aten.index_put_):
                args = (args[0], _all_of_masks(args[1]), *args[2:])
            result = func(*args, **kwargs)
        if packet == GROUPED:
            self.flops += grouped_flops(args)
        elif count := flop_registry.get(SAME_PRODUCTS.get(packet, packet)):
            self.flops += count(*args, **kwargs, out_val=result)
        tree_map_only(Tensor, self._enter, result)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, storage._cdata)

    def _leave(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _places(mask: Tensor) -> Tensor:
    """`mask.nonzero()` of an all-true mask."""
    return torch.zeros(mask.numel(), mask.dim(), dtype=torch.int64)


def _all_of_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean-mask indices as integer indices."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            numbers += _places(index).unbind(1)
        else:
            numbers.append(index)
    return numbers
