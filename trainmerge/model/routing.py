"""Routers of mixtures of experts in a module: where they are, what they read, and what they choose.

A router of transformers says how many experts it has and how many of them each token gets, and has one weight
[E, H]; its outputs are logits, the chosen experts' weights, and their numbers.

Legend: `E` experts of a layer, `H` hidden size, `R` tokens, `k` experts for each token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainmerge.model.hooks import hooked

PROBE = 64  # random states by which a router's kind of scores is found
NEAR = 0.02  # what rounding to bfloat16 may change of a token's weights, whose sum is 1


class RouterChoice(NamedTuple):
    """A router's choices for some tokens."""

    states: Tensor  # [R, H]
    logits: Tensor  # [R, E]
    weights: Tensor  # [R, k]
    experts: Tensor  # [R, k]


def routers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> router, in the network's order; empty for a dense model."""
    return {name: own for name, own in module.named_modules() if _is_router(own)}


def _is_router(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    counts = getattr(module, "num_experts", None), getattr(module, "top_k", None)
    weight = own.get("weight")
    return (
        weight is not None and weight.dim() == 2 and counts[0] == len(weight) and isinstance(counts[1], int)
    )


def choice_of(router: nn.Module, states: Tensor, output: Sequence[Tensor]) -> RouterChoice:
    """A router's outputs, in one order.

    Llama 4's are scores [R, E], 0 for experts that are not chosen, and logits.
    """
    flat = states.flatten(0, -2)
    numbers = [own for own in output if not own.is_floating_point()]
    if numbers:
        logits, weights = (own for own in output if own.is_floating_point())
        return RouterChoice(flat, logits, weights, numbers[0])
    scores, logits = output
    top_k: Any = router.top_k
    experts = logits.topk(top_k, dim=-1).indices
    return RouterChoice(flat, logits, scores.gather(-1, experts), experts)


@contextmanager
def watching_routers(
    routers: Mapping[str, nn.Module], see: Callable[[str, RouterChoice], None]
) -> Iterator[None]:
    """In this context, `see` gets each router's name and its choices, in every forward pass."""

    def read(name: str, router: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        see(name, choice_of(router, given[0], output))

    with hooked(own.register_forward_hook(partial(read, name)) for name, own in routers.items()):
        yield


@torch.no_grad()
def has_sigmoid_scores(router: nn.Module) -> bool:
    """Whether the experts' weights are sigmoids of their logits up to a factor; found by a probe.

    Others are parts of a softmax, or PhiMoE's sparse mixer.
    """
    weight: Tensor = router.weight  # type: ignore[assignment]
    dice = torch.Generator().manual_seed(0)
    states = torch.randn(PROBE, weight.shape[1], generator=dice).to(weight)
    found = choice_of(router, states, router(states))
    logits = found.logits.float()
    one, other = (
        _apart(found.weights.float(), scores.gather(-1, found.experts))
        for scores in (logits.sigmoid(), logits.softmax(-1))
    )
    return one < other and one < NEAR * PROBE


def _apart(weights: Tensor, scores: Tensor) -> float:
    """How far two [R, k] are from each other up to a factor: one each token, or one for all if k is 1."""
    if weights.shape[-1] > 1:
        weights, scores = (own / own.sum(-1, keepdim=True) for own in (weights, scores))
    else:
        weights, scores = (own / own.mean() for own in (weights, scores))
    return float((weights - scores).abs().sum())
