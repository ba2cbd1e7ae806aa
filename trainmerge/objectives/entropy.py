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


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || softmax(logits)), [B, V] log-probabilities and logits -> [B]; 0 where they agree."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return (teacher.exp() * (teacher - log_p)).sum(dim=-1)


@dataclass(frozen=True)
class Entropy(Objective):
    """Mean entropy of the predictions stands in for the missing labels.

    Yang et al., AdaMerging, ICLR 2024 (arXiv 2310.02575), equation 4. For a language model the
    entropies of the positions in `batch.mask` are averaged within an example.

    Entropy alone rewards confident wrong answers. Two guards, both without labels, for classification:

    Args:
        diversity: Subtract that multiple of the batch marginal's entropy. At 1 the loss is the negative
            mutual information of input and prediction (Bridle et al., NeurIPS 1991; Liang et al., ICML
            2020): a model that answers everything alike gains nothing.
        agreement: Add that multiple of KL(expert || merge), the expert's own predictions on its own
            calibration examples, recorded once before the fit: confidence pays only where the task's
            expert has it too.
    """

    diversity: float = 0.0
    agreement: float = 0.0

    @property
    @override
    def asks_teacher(self) -> bool:
        return self.agreement > 0

    @override
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B].

        Raises:
            ValueError: a guard is asked for with token-level logits.
        """
        logits = outputs.logits
        if logits.dim() == 3:
            if self.diversity or self.agreement:
                raise ValueError(
                    "diversity and agreement need a classification head; language models have none"
                )
            mask = batch.mask.to(torch.float32)
            return (entropy(logits) * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        loss = entropy(logits)
        if self.diversity:
            loss = loss - self.diversity * marginal_cross_entropy(logits)
        if self.agreement:
            assert batch.teacher is not None
            loss = loss + self.agreement * divergence(batch.teacher, logits)
        return loss
