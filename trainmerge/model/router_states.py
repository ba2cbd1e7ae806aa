"""The routers of a merged mixture, by the tensors of the base's files, and what they read.

Legend: `R` tokens, `H` hidden size.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trainmerge.data.batch import Batch
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.routing import has_sigmoid_scores, routers_of
from trainmerge.model.token_states import TOKENS, evenly_spaced, keeping
from trainmerge.preprocess import Router


def merged_routers(merged: MergedModel) -> list[Router]:
    """The routers whose weights are merged, in the network's order."""
    names = {id(merged.placed.owners[name]): name for name in merged.coefficients.layout.groups}
    found = []
    for own in routers_of(merged.module).values():
        inside = dict(own.named_parameters(recurse=False))
        tensors = {kind: names.get(id(parameter)) for kind, parameter in inside.items()}
        if weight := tensors.get("weight"):
            found.append(Router(weight, tensors.get("bias"), has_sigmoid_scores(own)))
    return found


@torch.no_grad()
def states_of(
    merged: MergedModel,
    router: Router,
    batches: Callable[[int], Iterable[Batch]],
    examples: Sequence[Sequence[object]],
    forward: Callable[[Batch], object],
) -> list[Tensor]:
    """Inputs [R, H] of a router in the model as it is: evenly `TOKENS` of every expert's examples."""
    owner = merged.placed.owners[router.weight]
    module = next(own for own in routers_of(merged.module).values() if own.weight is owner)
    found = []
    for expert, own in enumerate(examples):
        kept: list[Tensor] = []
        for batch in batches(expert):
            chosen = evenly_spaced(batch.inputs["attention_mask"], max(1, TOKENS // len(own)))
            with keeping({router.weight: module}, {router.weight: kept}, chosen):
                forward(batch)
        found.append(torch.cat(kept))
    return found
