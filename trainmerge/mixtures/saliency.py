"""What a mixture's experts do on calibration texts, in one pass, a layer in memory at a time.

Legend: `E` experts of a layer, `k` of them for each token, `H` hidden size, `I` width of an expert, `R`
tokens, `S` tokens that are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.checkpoints import Checkpoint, LoadedModel, load_meta_model
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.mixtures.experts import Experts, gating_of
from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.model.media_forward import backbone
from trainmerge.model.routing import RouterChoice, watching_routers
from trainmerge.model.streamed import streamed
from trainmerge.model.token_states import evenly_spaced
from trainmerge.system.console import progress

TOGETHER = 16  # texts per forward pass; every pass reads all weights once
KEPT = 2048  # tokens of all texts whose states are kept for each layer
PAIRS = 4096  # (token, expert) pairs that are computed at a time


@dataclass
class Saliency:
    """Sums over the tokens that reach each expert of one layer.

    Args:
        usage: Number of tokens, [E].
        norms: Sum of weight times norm of the output, [E].
        gated: Sum of weight times output, [E, H].
        alike: Sum of the outer products of the router's logits over all tokens, [E, E].
        states: What the router read at some tokens, [S, H].
        chosen: The experts of those tokens, [S, k].
        weights: Their weights, [S, k].
        routed: What the experts make of them together, [S, H].
        outputs: Sum of every expert's output at those tokens, chosen or not, [E, H]; 0 unless requested.
        gating: An expert's gate and up projections [R, I] -> what its down projection reads.
    """

    usage: Tensor
    norms: Tensor
    gated: Tensor
    alike: Tensor
    states: Tensor
    chosen: Tensor
    weights: Tensor
    routed: Tensor
    outputs: Tensor
    gating: Callable[[Tensor, Tensor], Tensor]

    @property
    def scores(self) -> Tensor:
        """REAP's saliency [E] (ICLR 2026, arXiv 2510.13999), with the model's own weights.

        The mean, over the tokens routed to an expert, of weight times norm of its output; 0 if none is.
        """
        return self.norms / self.usage.clamp_min(1)

    def importance(self, weights: str) -> Tensor:
        """Weights of a mean over experts, [E]: `saliency` or `usage`; 0 is the least of the rest."""
        found = self.usage if weights == "usage" else self.scores
        reached = found[found > 0]
        return found.clamp_min(float(reached.min()) if len(reached) else 1.0)


@torch.no_grad()
def measure(
    base: Checkpoint,
    layers: Sequence[MixtureLayer],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    every: bool = False,
) -> dict[str, Saliency]:
    """Each layer's sums, by its prefix; with `every`, those of all experts' outputs too."""
    loaded = load_meta_model(base)
    routers = {layer.prefix: _module(loaded, layer.weight) for layer in layers}
    experts = {layer.prefix: Experts(_module(loaded, layer.weight, "experts")) for layer in layers}
    below: Any = backbone(loaded.module)  # the head's logits would be the largest tensor, for nothing
    found: dict[str, Saliency] = {}
    chosen = torch.empty(0)
    kept = torch.empty(0)

    def see(prefix: str, choice: RouterChoice) -> None:
        module, some = experts[prefix], RouterChoice(*(part[kept] for part in choice))
        if prefix not in found:
            found[prefix] = _empty(module, choice)
        _add(found[prefix], module, RouterChoice(*(part[chosen] for part in choice)))
        _keep(found[prefix], module, some, every)

    with streamed(loaded, base), watching_routers(routers, see):
        for first in progress(range(0, len(examples), TOGETHER), "measuring experts"):
            inputs = tokenizer.encode(examples[first : first + TOGETHER]).inputs
            chosen = inputs["attention_mask"].flatten().bool()
            kept = evenly_spaced(inputs["attention_mask"], max(1, KEPT // len(examples)))
            below(**inputs)
    return found


def _module(loaded: LoadedModel, router: str, sibling: str = "") -> nn.Module:
    """A router by its weight's name in the files, or the module beside it."""
    path = loaded.names[router].rpartition(".")[0]
    return loaded.module.get_submodule(f"{path.rpartition('.')[0]}.{sibling}" if sibling else path)


def _empty(experts: Experts, choice: RouterChoice) -> Saliency:
    count, width = choice.logits.shape[1], choice.states.shape[1]
    zeros = torch.zeros(count, width, dtype=torch.float64)
    square = torch.zeros(count, count, dtype=torch.float64)
    none = choice.states[:0], choice.experts[:0], choice.weights[:0], choice.states[:0]
    first = zeros[:, 0]
    gating = gating_of(experts.experts)
    return Saliency(first.clone(), first.clone(), zeros, square, *none, zeros.clone(), gating)


def _add(own: Saliency, experts: Experts, choice: RouterChoice) -> None:
    """Add a batch's tokens to a layer's sums."""
    logits = choice.logits.double()
    own.alike += logits.T @ logits
    tokens = torch.arange(len(choice.states)).repeat_interleave(choice.experts.shape[1])
    numbers, weights = choice.experts.flatten(), choice.weights.flatten()
    for begin in range(0, len(tokens), PAIRS):
        part = slice(begin, begin + PAIRS)
        gated = experts(choice.states[tokens[part]], numbers[part, None], weights[part, None]).double()
        own.usage.index_add_(0, numbers[part], torch.ones(len(gated), dtype=torch.float64))
        own.norms.index_add_(0, numbers[part], gated.norm(dim=1))
        own.gated.index_add_(0, numbers[part], gated)


def _keep(own: Saliency, experts: Experts, some: RouterChoice, every: bool) -> None:
    """Keep some tokens' states, their choice, and what the experts make of them."""
    own.states = torch.cat([own.states, some.states])
    own.chosen = torch.cat([own.chosen, some.experts])
    own.weights = torch.cat([own.weights, some.weights])
    own.routed = torch.cat([own.routed, experts(some.states, some.experts, some.weights)])
    ones = torch.ones(len(some.states), 1, dtype=some.states.dtype)
    for number in range(len(own.usage) if every else 0):
        out = experts(some.states, torch.full((len(some.states), 1), number), ones)
        own.outputs[number] += out.double().sum(0)
