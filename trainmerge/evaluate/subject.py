"""A model to score on tasks, and its score on one.

Legend: `N` examples of a task, `B` of a batch, `T` tokens, `V` classes or vocabulary, `P` pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainmerge.data.batch import Batch
from trainmerge.data.classifier import Classifier
from trainmerge.data.encoded import Encoded
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.embedding import Embedding
from trainmerge.model.forward import forward
from trainmerge.model.own_head import OwnModel


class TaskScore(NamedTuple):
    """A model's measures on a task; the first is its score.

    `outcomes` [N, 2] float64, in the task's order: each example's contribution to a sum and a count. Their
    ratio is the score (accuracy), or its logarithm (perplexity).
    """

    measures: Mapping[str, float]
    outcomes: Tensor

    @property
    def score(self) -> float:
        """The task's main measure."""
        return next(iter(self.measures.values()))


@dataclass(frozen=True)
class Subject:
    """A model to score, with the tasks' frozen heads."""

    module: nn.Module
    heads: Mapping[str, Classifier | OwnModel | None]  # by task
    tokenize: Tokenizer
    answers: int = 0  # maximal tokens of an answer
    embedding: Embedding | None = None  # of a sentence embedder
    references: Mapping[str, Tensor] = field(default_factory=dict)  # task -> its expert's cosines [P]
    _lengths: dict[str, list[int]] = field(default_factory=dict, repr=False)  # task -> tokens, once counted

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.module.parameters()).device

    def lengths(self, task: str, examples: Sequence[Example]) -> list[int]:
        """The tokens of each of a task's examples after truncation, [N]; 1 for pictures and sounds."""
        if task not in self._lengths:
            self._lengths[task] = [
                1 if e.image or e.audio else self.tokenize.encode([e]).inputs["input_ids"].shape[1]
                for e in examples
            ]
        return self._lengths[task]

    def logits(self, task: str, encoded: Encoded) -> Tensor:
        """Logits [B, V] of the task's head or of the model's classifier, else [B, T, V]; or of their kind."""
        here = {name: tensor.to(self.device) for name, tensor in encoded.inputs.items()}
        ids = torch.arange(len(encoded.mask), device=self.device)
        return forward(self.module, Batch(0, here, encoded.mask, ids), self.heads[task]).logits
