"""Entropy of the merged model's predictions (AdaMerging), with guards against collapse.

Legend: `B` examples, `T` tokens, `V` classes or vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.data.batch import Asks, Batch, Outputs
from trainmerge.objectives.base import Objective
from trainmerge.objectives.rows import expert_divergence, reduced
from trainmerge.system import distributed
from trainmerge.system.ranges import check_fields


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), [..., V] -> [...], in the log domain and float32 or wider.

    p log p is a product with a finite log-probability, so a saturated prediction has value 0 and gradient 0,
    where log(softmax + eps) is biased or NaN.
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def marginal_cross_entropy(logits: Tensor, share: float = 1.0) -> Tensor:
    """-sum_v p_bv log(mean_b p_bv), [B, V] -> [B]: its mean over the batch is the marginal's entropy.

    The batch is that of all processes; these rows are this process's `share` of it (`Batch.share`).
    """
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    marginal = p.mean(dim=0)
    if distributed.world_size() > 1:  # needs no gradient: sum_v m_v d log m_v = d sum_v m_v = 0
        marginal = distributed.all_reduce(share * marginal.detach()) / distributed.world_size()
    return -(p * marginal.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


@dataclass(frozen=True)
class Entropy(Objective):
    """Mean entropy of the predictions, a surrogate for the missing labels.

    Yang et al., AdaMerging, ICLR 2024 (arXiv 2310.02575), equation 4. For a language model the
    entropies of the positions in `batch.mask` are averaged within an example.

    Entropy alone rewards confident wrong answers. Two guards, both without labels:

    Args:
        diversity: Weight of the batch marginal's entropy, which is subtracted. At 1 the loss is the negative
            mutual information of input and prediction (Bridle et al., NeurIPS 1991; Liang et al., ICML 2020),
            so constant predictions gain nothing. For classification only.
        agreement: Weight of KL(expert || merge), which is added. The expert's predictions on its own
            calibration examples are recorded once before the fit. Confidence then pays only where the task's
            expert is confident too.
    """

    diversity: float = 0.0
    agreement: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, diversity="[0, inf)", agreement="[0, inf)")

    @property
    @override
    def asks(self) -> Asks:
        return Asks(temperature=1.0) if self.agreement else Asks()

    @property
    @override
    def needs_classes(self) -> bool:
        return self.diversity != 0

    @property
    @override
    def needs_predictions(self) -> bool:
        return True

    @property
    @override
    def couples(self) -> bool:
        return bool(self.diversity)

    @override
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B].

        Raises:
            ValueError: diversity needs one row of logits per example, these are token-level; or a regression.
        """
        logits, kind = outputs.logits, outputs.kind
        if kind != "classes" and self.diversity:
            raise ValueError("diversity needs a classification head; language models have none")
        if kind == "values":
            raise ValueError("the numbers of a regression have no entropy: use Alignment")
        if kind == "tokens":
            loss = _token_entropy(logits, batch.mask)
        else:
            loss = reduced(entropy(logits), kind, len(logits))
        if self.diversity:
            loss = loss - self.diversity * marginal_cross_entropy(logits, batch.share)
        if self.agreement:
            loss = loss + self.agreement * expert_divergence(outputs, batch)
        return loss


def _token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(torch.float32)
    return (entropy(logits) * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
