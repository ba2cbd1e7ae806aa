"""A model to score on tasks, and its score on one.

Legend: `N` examples of a task, `B` of a batch, `T` tokens, `V` classes or vocabulary, `P` pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainmerge.data.batch import Batch
from trainmerge.data.classifier import Classifier
from trainmerge.data.encoded import Encoded
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.stateless import is_stateless
from trainmerge.evaluate.task_texts import TaskTexts
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
    answers: int | None = None  # maximal tokens of an answer; None and 0 skip prompts
    embedding: Embedding | None = None  # of a sentence embedder
    references: Mapping[str, Tensor] = field(default_factory=dict)  # task -> its expert's cosines [P]
    _texts: dict[str, TaskTexts] = field(default_factory=dict, repr=False)  # by task
    _stateless: dict[str, bool] = field(default_factory=dict, repr=False)  # by task

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.module.parameters()).device

    def texts(self, task: str, examples: Sequence[Example]) -> TaskTexts:
        """A task's examples, which are tokenised once for all merges in the model."""
        if task not in self._texts:
            self._texts[task] = TaskTexts(examples, self.tokenize)
        return self._texts[task]

    def is_stateless(self, task: str, texts: TaskTexts) -> bool:
        """Whether a task's forwards leave the model as it was: tried on its shortest and longest."""
        if task not in self._stateless:
            head, lengths = self.heads[task], texts.lengths()
            model = head.module if isinstance(head, OwnModel) else self.module
            short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
            tried = (partial(self.logits, task, texts.batch(some)) for some in ([short], [short, long]))
            self._stateless[task] = all(is_stateless(model, forward) for forward in tried)
        return self._stateless[task]

    def logits(self, task: str, encoded: Encoded) -> Tensor:
        """Logits [B, V] of the task's head or of the model's classifier, else [B, T, V]; or of their kind."""
        here = {name: tensor.to(self.device) for name, tensor in encoded.inputs.items()}
        ids = torch.arange(len(encoded.mask), device=self.device)
        return forward(self.module, Batch(0, here, encoded.mask, ids), self.heads[task]).logits
