"""A model's predictions of a batch, and how far two of them are apart.

Legend: `R` rows, `V` vocabulary or classes.
"""

from math import log

import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Outputs


def predictions(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R, V] and the next tokens [R]; no tokens under a head.

    Raises:
        ValueError: the head is a regression, whose numbers are no predictions.
    """
    logits = outputs.logits
    if outputs.kind == "values":
        raise ValueError("a method needs each expert's predictions, and a regression's numbers are none")
    if outputs.of is not None:  # an expert's own head
        logits = logits[batch.mask] if outputs.of == "tokens" else logits.flatten(0, -2)
    if logits.dim() == 2:
        return logits.float().log_softmax(-1), torch.zeros(len(logits), dtype=torch.int64)
    tokens = batch.inputs.get("labels", batch.inputs["input_ids"])
    if "labels" not in batch.inputs:  # a decoder's input is already shifted
        logits, tokens, counted = logits[:, :-1], tokens[:, 1:], batch.mask[:, :-1] & batch.mask[:, 1:]
    else:
        counted = batch.mask
    return logits[counted].float().log_softmax(-1), tokens[counted]


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Mean over rows of the Jensen-Shannon divergence of two log-probabilities [R, V]; float64, in nats."""
    middle = torch.logaddexp(one, other) - log(2)
    both = torch.stack([(log_p.exp() * (log_p - middle)).sum(-1) for log_p in (one, other)])
    return both.mean(dim=0).double().mean()
