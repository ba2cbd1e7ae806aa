"""Entropy of the merged model's predictions (AdaMerging), and what keeps it from collapsing.

Legend: `B` examples, `T` tokens, `V` classes or vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.batch import Batch, Outputs
from trainmerge.objectives.objective import Objective


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), [..., V] -> [...], in the log domain and float32 or wider.

    p log p is formed as a product with a finite log-probability, so a saturated prediction has the
    value 0 and a gradient of 0, where log(softmax + eps) is biased or NaN.
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def marginal_cross_entropy(logits: Tensor) -> Tensor:
    """-sum_v p_bv log(mean_b p_bv), [B, V] -> [B]: its mean over the batch is the marginal's entropy."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    marginal = p.mean(dim=0)
    return -(p * marginal.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


@dataclass(frozen=True)
class Entropy(Objective):
    """Mean entropy of the predictions stands in for the missing labels.

    Yang et al., AdaMerging, ICLR 2024 (arXiv 2310.02575), equation 4. For a language model the
    entropies of the positions in `batch.mask` are averaged within an example.

    `diversity` > 0 subtracts that multiple of the batch marginal's entropy, which at 1 makes the loss
    the negative mutual information of input and prediction (Bridle et al., NeurIPS 1991; used for
    adaptation by Liang et al., ICML 2020): a model that answers everything alike gains nothing. Only
    for classification heads.
    """

    diversity: float = 0.0

    @override
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B].

        Raises:
            ValueError: `diversity` is asked for with token-level logits.
        """
        logits = outputs.logits
        if logits.dim() == 3:
            if self.diversity:
                raise ValueError(
                    "Entropy(diversity=...) needs a classification head; language models have none"
                )
            mask = batch.mask.to(torch.float32)
            return (entropy(logits) * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        loss = entropy(logits)
        return loss - self.diversity * marginal_cross_entropy(logits) if self.diversity else loss
