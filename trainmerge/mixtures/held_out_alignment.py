"""How near a model is to each expert on that expert's held-out texts.

Legend: `R` tokens of a text, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from trainmerge.data.batch import Batch
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.forward import forward
from trainmerge.model.resident import Resident

BYTES = 256 << 20  # of the experts' predictions, all together


class Recorded(NamedTuple):
    """One text, and its expert's log-probabilities [R, V]."""

    batch: Batch
    log_p: Tensor


@torch.no_grad()
def record_predictions(
    resident: Resident, examples: Sequence[Sequence[Example]], tokenizer: Tokenizer
) -> list[list[Recorded]]:
    """Each expert's predictions of the first of its texts, as many as fit into `BYTES`, at least one."""
    found: list[list[Recorded]] = []
    for expert, own in enumerate(examples):
        kept: list[Recorded] = []
        with resident.merged.teacher(expert) as module:
            for example in own:
                batch = resident.batch(expert, [example], tokenizer)
                kept.append(Recorded(batch, _log_p(module, batch)))
                if sum(one.log_p.nbytes for one in kept) * len(examples) > BYTES:
                    break
        found.append(kept)
    return found


@torch.no_grad()
def mean_divergence(module: nn.Module, recorded: Sequence[Sequence[Recorded]]) -> float:
    """KL(expert || model) in nats per token: the mean over an expert's tokens, then over the experts."""
    means = []
    for own in recorded:
        total = sum(
            float(kl_div(_log_p(module, one.batch), one.log_p, reduction="sum", log_target=True))
            for one in own
        )
        means.append(total / sum(len(one.log_p) for one in own))
    return sum(means) / len(means)


def _log_p(module: nn.Module, batch: Batch) -> Tensor:
    logits = forward(module, batch, None).logits
    return logits[batch.mask].float().log_softmax(-1).cpu()
