"""One model on one task -> its measures, and every example's contribution to the score.

Legend: `N` examples of a task, `B` of a batch, `T` tokens, `V` classes or vocabulary.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from trainmerge.data.batch import Batch
from trainmerge.data.heads import Classifier
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.tasks import Task
from trainmerge.evaluate.torchmetrics_states import AnswerLengths, TokenLosses, class_measures
from trainmerge.model.forward import forward
from trainmerge.system.distributed import merge_shares, own_share

TOGETHER = 64  # texts per forward pass with a head
TOKENS = 512  # per forward pass of a language model, about


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
    heads: Mapping[str, Classifier | None]  # by task
    tokenize: Tokenizer
    answers: int = 0  # maximal tokens of an answer

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.module.parameters()).device

    def with_heads(self, heads: Mapping[str, Classifier | None]) -> "Subject":
        """The same model with other tasks' heads."""
        return replace(self, heads=heads)

    def logits(self, task: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of inputs [B, T]: [B, V] with the task's head, [B, T, V] without; and the encoded inputs."""
        here = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        mask = here["attention_mask"].bool()
        ids = torch.arange(len(mask), device=self.device)
        return forward(self.module, Batch(0, here, mask, ids), self.heads[task]).logits, here


@torch.inference_mode()
def score_task(subject: Subject, task: Task) -> TaskScore:
    """All measures of a task. Several processes split the examples, and all get the result."""
    return _classes(subject, task) if task.head else _texts(subject, task)


def _classes(subject: Subject, task: Task) -> TaskScore:
    """Texts are sorted by length, to reduce padding."""
    classifier = subject.heads[task.name]
    assert classifier is not None
    if (highest := max(task.labels)) >= len(classifier.weight):
        raise ValueError(f"{task.name}: its file has label {highest}; its head has {len(classifier.weight)}")
    metric = class_measures(len(classifier.weight))
    right: dict[int, tuple[float, float]] = {}
    order = own_share(sorted(range(len(task.texts)), key=lambda i: len(task.texts[i])))
    for first in range(0, len(order), TOGETHER):
        chosen = order[first : first + TOGETHER]
        logits, _ = subject.logits(task.name, subject.tokenize([task.texts[i] for i in chosen]))
        p = logits.float().softmax(-1).cpu()  # torchmetrics mistakes logits in [0, 1] for probabilities
        labels = torch.tensor([task.labels[i] for i in chosen])
        metric.update(p, labels)
        hits = (p.argmax(-1) == labels).tolist()
        right |= {i: (float(hit), 1.0) for i, hit in zip(chosen, hits, strict=True)}
    found = _computed(metric)
    measures = {"accuracy": found.pop("accuracy"), **found}  # the score comes first
    return TaskScore(measures, _in_order(merge_shares(right)))


def _texts(subject: Subject, task: Task) -> TaskScore:
    """Losses over all tokens but the first of each text."""
    metric = TokenLosses()
    found: dict[int, tuple[float, float]] = {}
    order = own_share(range(len(task.texts)))
    encoded = {i: subject.tokenize.located(task.texts[i]) for i in order}
    size = max(1, TOKENS // max((e.length for e in encoded.values()), default=1))
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        losses, counts = token_losses(subject, task.name, [task.texts[i] for i in chosen])
        metric.update(losses, counts, torch.tensor([encoded[i].bytes for i in chosen], dtype=torch.float64))
        pairs = zip(losses.tolist(), counts.tolist(), strict=True)
        found |= dict(zip(chosen, pairs, strict=True))
    measures = _computed(metric)
    if subject.answers and task.prompts:
        measures |= _answer_lengths(subject, task)
    return TaskScore(measures, _in_order(merge_shares(found)))


def token_losses(subject: Subject, task: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each text's negative log-likelihood in nats and number of tokens predicted, both [B] float64."""
    logits, inputs = subject.logits(task, subject.tokenize(texts))
    told = inputs["attention_mask"][:, 1:].bool()
    losses = torch.zeros(told.shape, dtype=torch.float64, device=told.device)
    tokens = inputs["input_ids"][:, 1:][told]
    losses[told] = nn.functional.cross_entropy(
        logits[:, :-1][told].float(), tokens, reduction="none"
    ).double()
    return losses.sum(-1).cpu(), told.sum(-1).double().cpu()


def _answer_lengths(subject: Subject, task: Task) -> dict[str, float]:
    """Greedy answers to the prompts, one at a time, without padding."""
    metric = AnswerLengths()
    generate: Any = subject.module.generate
    for prompt in own_share(task.prompts):
        inputs = {name: tensor.to(subject.device) for name, tensor in subject.tokenize([prompt]).items()}
        answer = generate(
            **inputs,
            max_new_tokens=subject.answers,
            do_sample=False,
            use_cache=True,
            pad_token_id=subject.tokenize.padding,
        )[0, inputs["input_ids"].shape[1] :]
        metric.update(len(answer), len(answer) < subject.answers)
    return _computed(metric)


def _computed(metric: Metric | MetricCollection) -> dict[str, float]:
    """The measures over all processes' examples; this process may have had none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was called before the ``update``")
        found: Mapping[str, Tensor] = metric.compute()
    return {name: float(value) for name, value in found.items()}


def _in_order(outcomes: Mapping[int, tuple[float, float]]) -> Tensor:
    return torch.tensor([outcomes[i] for i in sorted(outcomes)], dtype=torch.float64)
