"""Each layer's router, from the inputs of the merge's feed-forward networks on the experts' own texts.

The router reads the normalised state after attention, so that is what is kept, not the residual stream; and
no padding.

Legend: `N` experts, `H` hidden size, `R` states.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.mixtures.router_rows import accuracy, fit_router_rows
from trainmerge.model.resident import Resident
from trainmerge.model.token_states import TOKENS, evenly_spaced, keeping
from trainmerge.system.console import progress

TOGETHER = 8  # texts per forward pass
BYTES = 1 << 30  # of states in memory, which decides how many layers share a pass


@dataclass(frozen=True)
class Learned:
    """A layer's router, and the share of held-out states that it sends to their own expert first."""

    rows: Tensor  # [N, H]
    accuracy: float


def learn_routers(
    resident: Resident,
    examples: Sequence[tuple[Sequence[Example], Sequence[Example]]],
    tokenizer: Tokenizer,
    networks: Mapping[str, nn.Module],
) -> dict[str, Learned]:
    """The router of every layer.

    Args:
        resident: The merge, materialised.
        examples: For each expert the texts to learn from, and held-out ones.
        tokenizer: The merge's.
        networks: Layer -> its feed-forward network in the merge.
    """
    found: dict[str, Learned] = {}
    learn, held = [one for one, _ in examples], [other for _, other in examples]
    for layers in _portions(resident, networks, len(examples)):
        states, labels = gather_states(resident, learn, tokenizer, layers)
        others, theirs = gather_states(resident, held, tokenizer, layers)
        for layer in progress(list(layers), "routers"):
            rows = fit_router_rows(states[layer], labels, len(examples))
            found[layer] = Learned(rows.cpu(), accuracy(rows, others[layer], theirs))
    return found


def _portions(
    resident: Resident, networks: Mapping[str, nn.Module], experts: int
) -> Iterator[dict[str, nn.Module]]:
    """The layers, as many at a time as have their states in memory."""
    model: Any = resident.merged.module
    weight: Tensor = model.get_input_embeddings().weight
    width, size = weight.shape[1], weight.element_size()
    count = max(1, BYTES // (2 * experts * TOKENS * width * size))
    layers = list(networks.items())
    yield from (dict(layers[first : first + count]) for first in range(0, len(layers), count))


@torch.no_grad()
def gather_states(
    resident: Resident,
    examples: Sequence[Sequence[Example]],
    tokenizer: Tokenizer,
    networks: Mapping[str, nn.Module],
) -> tuple[dict[str, Tensor], Tensor]:
    """Network -> its inputs [R, H], and the expert of each, [R]: `TOKENS` per expert, evenly from texts."""
    kept: dict[str, list[Tensor]] = {layer: [] for layer in networks}
    labels = []
    for expert, own in enumerate(examples):
        most = max(1, TOKENS // len(own))
        for first in range(0, len(own), TOGETHER):
            batch = resident.batch(expert, own[first : first + TOGETHER], tokenizer)
            chosen = evenly_spaced(batch.inputs["attention_mask"], most)
            with keeping(networks, kept, chosen):
                resident(batch)
            labels.append(torch.full((len(chosen),), expert, device=resident.device))
    return {layer: torch.cat(states) for layer, states in kept.items()}, torch.cat(labels)
