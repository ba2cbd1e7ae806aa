"""The coefficient gradient of low-rank experts at a linear layer, without forming its weight gradient.

For Y = X W^T and tau = s B A, with the layer's input X [T, in] and its output's gradient dY [T, out]:

    <dL/dW, tau> = <dY^T X, s B A> = s sum_t sum_r (X A^T)[t, r] (dY B)[t, r]

Two thin products replace the T x out x in one, and nothing of the weight's size is written.

This covers what the layer's own forward does with its weight, and no more: every other use of the weight gets
an ordinary gradient (`tapped`), so the sum is right wherever a model reads it.

Legend: `K` experts, `C` chunks of rows, `T` tokens, `R` the sum of the experts' ranks.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from trainmerge.kernels import LowRank, Untouched, accumulation_dtype, chunk_bounds
from trainmerge.task_vectors.delta import Delta

Collect = Callable[[Tensor, Tensor], None]  # (layer's input, gradient of its output)


class _Tap(torch.autograd.Function):
    """The identity on the output; its backward calls `collect` with the layer's input and the gradient."""

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, inputs: Tensor, _asks: Tensor, collect: Collect) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.collect = collect
        return output.data  # not the input, not a view of it: a model may write to it in place

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.collect(inputs, gradients[0])
        return gradients[0], None, None, None


@contextmanager
def tapped(layer: nn.Linear, collect: Collect) -> Iterator[None]:
    """Call `collect` in each backward through the layer's forward, recomputed forwards too.

    The layer's forward reads a detached weight: its part of the weight's gradient is never formed. The weight
    itself still requires a gradient, so whatever else reads it (`layer.weight.T @ x`, a fused kernel, another
    module) contributes an ordinary gradient, and the two add up to the whole one.
    """
    weight = layer.weight

    def forward(input: Tensor) -> Tensor:  # nn.Linear's own name, for callers with a keyword
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or layer.weight is not weight:
            return F.linear(input, layer.weight, layer.bias)
        output = F.linear(input, weight.detach(), layer.bias)
        # A leaf that asks for the gradient: nothing before the layer may need one.
        asks = torch.zeros((), device=output.device, requires_grad=True)
        # In the output's dtype, to which autocast cast the input.
        result: Tensor = _Tap.apply(output, input.detach().to(output.dtype), asks, collect)  # type: ignore[no-untyped-call]
        return result

    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


def tappable(
    module: nn.Module, parameters: Mapping[str, Tensor], deltas: Mapping[str, Delta]
) -> Iterator[tuple[str, nn.Linear]]:
    """The parameters whose gradients need not be formed: (name, layer) of each.

    The weight must belong to a plain `nn.Linear` only, whose forward nothing has replaced, and not be
    sharded. Every expert's change must be low-rank or zero, with ranks small enough that two thin products
    cost less than the gradient. Every process finds the same parameters.
    """
    own = {id(parameter): name for name, parameter in parameters.items()}
    # each module once, and each parameter once per module that has it
    users = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    for layer in module.modules():
        if type(layer) is not nn.Linear or "forward" in vars(layer):
            continue
        if id(layer.weight) not in own or users[id(layer.weight)] > 1:
            continue
        name = own[id(layer.weight)]
        terms = deltas[name].terms
        ranks = sum(len(term.down) for term in terms if isinstance(term, LowRank))
        thin = ranks * sum(layer.weight.shape) < layer.weight.numel()
        only = all(isinstance(term, LowRank | Untouched) for term in terms)
        if only and thin and type(layer.weight.data) is Tensor:
            yield name, layer


def layer_products(inputs: Tensor, slopes: Tensor, delta: Delta, chunks: int) -> Tensor:
    """<dY^T X, s B A> of each expert and chunk of rows -> [K, C], float32 or wider."""
    dtype = accumulation_dtype(slopes.dtype)
    x, dy = (part.reshape(-1, part.shape[-1]).to(dtype) for part in (inputs, slopes))
    result = torch.zeros(len(delta.terms), chunks, dtype=torch.float64, device=dy.device)
    low = [(k, term) for k, term in enumerate(delta.terms) if isinstance(term, LowRank)]
    if not low:
        return result.to(dtype)
    inside = x @ torch.cat([term.down.to(x) for _, term in low]).T  # [T, R]
    up = torch.cat([term.up.to(dy) for _, term in low], dim=1)  # [out, R]
    scales = torch.tensor([term.scale for _, term in low], dtype=torch.float64, device=dy.device)
    experts = torch.tensor([k for k, _ in low], device=dy.device)
    sizes = [len(term.down) for _, term in low]
    for chunk, (first, last) in enumerate(pairwise(chunk_bounds(dy.shape[1], chunks))):
        by_rank = (inside * (dy[:, first:last] @ up[first:last])).sum(0, dtype=torch.float64)  # [R]
        result[experts, chunk] = scales * torch.stack([part.sum() for part in torch.split(by_rank, sizes)])
    return result.to(dtype)
