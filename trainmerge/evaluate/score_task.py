"""One model on one task -> its measures, and every example's contribution to the score.

Legend: `N` examples of a task, `B` of a batch, `T` tokens, `V` classes or vocabulary.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from trainmerge.data.encoded import Encoded
from trainmerge.data.examples import Example
from trainmerge.evaluate.by_length import TOKENS, by_length
from trainmerge.evaluate.measure import check_causal, predicted
from trainmerge.evaluate.pairs import Similar
from trainmerge.evaluate.score_heads import found_in, measures_of
from trainmerge.evaluate.similarity import cosines, embed_texts, ndcg
from trainmerge.evaluate.subject import Subject, TaskScore
from trainmerge.evaluate.tasks import Task
from trainmerge.evaluate.torchmetrics_states import AnswerLengths, TokenLosses, class_measures
from trainmerge.system.correlation import rank_terms
from trainmerge.system.distributed import merge_shares, own_share
from trainmerge.system.side_by_side import side_by_side

ON_A_GPU = 8192  # tokens per forward pass with a head, about


@torch.inference_mode()
def score_task(subject: Subject, task: Task) -> TaskScore:
    """All measures of a task. Several processes split the examples, and all get the result."""
    if task.similar is not None:
        return _similarities(subject, task.name, task.similar)
    if not task.labels:
        return _texts(subject, task)
    return _classes(subject, task) if task.kind == "classes" else _of_head(subject, task)


def score_tasks(subject: Subject, tasks: Sequence[Task]) -> dict[str, TaskScore]:
    """Scores of one model on several tasks."""
    return {task.name: score_task(subject, task) for task in tasks}


def _similarities(subject: Subject, name: str, similar: Similar) -> TaskScore:
    """Retrieval by queries; else Spearman's correlation by pairs, with the ranks of the whole file."""
    assert subject.embedding is not None
    texts = subject.texts(name, [Example(text) for text in similar.texts])
    rows = embed_texts(subject.module, subject.embedding, texts)
    if similar.documents is not None:
        terms = ndcg(rows, similar)
    else:
        wanted = subject.references[name] if similar.scores is None else similar.scores
        terms = rank_terms(cosines(rows, similar), wanted)
    outcomes = torch.stack([terms, torch.ones_like(terms)], dim=1)
    return TaskScore({similar.measure: float(terms.mean())}, outcomes)


def _batches(subject: Subject, task: Task, numbers: Iterable[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and logits of some of a task's examples, by length; on a CPU several batches side by side."""
    texts, here = subject.texts(task.name, task.examples), subject.device.type == "cpu"
    chosen = by_length(numbers, texts.lengths(), TOKENS if here else ON_A_GPU)
    batches = ((numbers, texts.batch(numbers)) for numbers in chosen)

    def scored(batch: tuple[list[int], Encoded]) -> tuple[list[int], Tensor]:
        return batch[0], subject.logits(task.name, batch[1])

    together = here and torch.get_num_threads() > 1 and subject.is_stateless(task.name, texts)
    yield from (side_by_side if together else map)(scored, batches)


def _classes(subject: Subject, task: Task) -> TaskScore:
    """One class per example."""
    return score_of(subject, task, dict(probabilities(subject, task, own_share(range(len(task.examples))))))


@torch.inference_mode()
def probabilities(subject: Subject, task: Task, numbers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Number and probabilities [V] of some of a task's examples, which have one class each.

    Raises:
        ValueError: the task has a label that its classifier has no class for.
    """
    if (highest := max(task.labels)) >= (classes := _width(subject, task)):
        raise ValueError(f"{task.name}: its file has label {highest}; its classifier has {classes} classes")
    for chosen, logits in _batches(subject, task, numbers):
        # torchmetrics mistakes logits in [0, 1] for probabilities
        yield from zip(chosen, logits.float().softmax(-1).cpu(), strict=True)


def _width(subject: Subject, task: Task) -> int:
    classifier, config = subject.heads[task.name], subject.module.config
    return classifier.width if classifier is not None else int(config.num_labels)  # type: ignore


def score_of(subject: Subject, task: Task, found: Mapping[int, Tensor]) -> TaskScore:
    """The score of all processes' probabilities; `found` are those of this process's examples, by number."""
    metric, right = class_measures(_width(subject, task)), {}
    if found:
        order = sorted(found)
        p, labels = torch.stack([found[i] for i in order]), torch.tensor([task.labels[i] for i in order])
        metric.update(p, labels)
        right = {i: (float(hit), 1.0) for i, hit in zip(order, p.argmax(-1) == labels, strict=True)}
    measured = _computed(metric)
    measures = {"accuracy": measured.pop("accuracy"), **measured}  # the score comes first
    return TaskScore(measures, _in_order(merge_shares(right)))


def _of_head(subject: Subject, task: Task) -> TaskScore:
    """An expert's own head whose outputs are not one class per text."""
    found: dict[int, Any] = {}
    for chosen, logits in _batches(subject, task, own_share(range(len(task.examples)))):
        examples, labels = [task.examples[i] for i in chosen], [task.labels[i] for i in chosen]
        each = found_in(task.kind, logits, examples, labels, subject.tokenize)
        found |= dict(zip(chosen, each, strict=True))
    every = merge_shares(found)
    return TaskScore(*measures_of(task.kind, [every[i] for i in sorted(every)]))


def _texts(subject: Subject, task: Task) -> TaskScore:
    """Losses over the tokens that count: of plain texts, all but the first; of targets, all."""
    plain = [
        e.spans is None and e.target is None and e.image is None and e.audio is None for e in task.examples
    ]
    if all(plain):
        _check(subject, task)
    metric = TokenLosses(bits=all(plain))
    found: dict[int, tuple[float, float]] = {}
    texts, order = subject.texts(task.name, task.examples), own_share(range(len(task.examples)))
    located = {i: texts.located(i) for i in order}
    lengths = [located[i].length if i in located else 0 for i in range(len(task.examples))]
    for chosen in by_length(order, lengths):
        losses, counts = token_losses(subject, task.name, texts.batch(chosen))
        metric.update(losses, counts, torch.tensor([located[i].bytes for i in chosen], dtype=torch.float64))
        pairs = zip(losses.tolist(), counts.tolist(), strict=True)
        found |= dict(zip(chosen, pairs, strict=True))
    measures = _computed(metric)
    if subject.answers and task.prompts:
        measures |= _answer_lengths(subject, task, subject.answers)
    return TaskScore(measures, _in_order(merge_shares(found)))


def _check(subject: Subject, task: Task) -> None:
    """Refuse a model whose perplexity would be undefined, by its longest text."""
    longest = max(task.examples, key=lambda example: len(example.text))
    inputs = subject.tokenize.encode([longest]).inputs
    if "labels" not in inputs:
        check_causal(subject.module, {name: tensor.to(subject.device) for name, tensor in inputs.items()})


def token_losses(subject: Subject, task: str, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Each example's negative log-likelihood in nats and number of tokens predicted, both [B] float64."""
    logits, told = subject.logits(task, encoded), predicted(encoded).to(subject.device)
    if "labels" in encoded.inputs:  # decoders get them shifted: position t predicts target t
        tokens = encoded.inputs["labels"].to(subject.device)
    else:
        logits, tokens = logits[:, :-1], encoded.inputs["input_ids"][:, 1:].to(subject.device)
        told &= ~_placeholders(subject.module, tokens)
    losses = torch.zeros(told.shape, dtype=torch.float64, device=told.device)
    losses[told] = nn.functional.cross_entropy(logits[told].float(), tokens[told], reduction="none").double()
    return losses.sum(-1).cpu(), told.sum(-1).double().cpu()


def _placeholders(module: nn.Module, tokens: Tensor) -> Tensor:
    """Which tokens [B, T] stand for a picture or a video: they are not text."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    own = [getattr(module.config, name, None) for name in names]
    return torch.isin(tokens, tokens.new_tensor([i for i in own if isinstance(i, int)]))


def _answer_lengths(subject: Subject, task: Task, longest: int) -> dict[str, float]:
    """Greedy answers to the prompts, one at a time, without padding."""
    metric = AnswerLengths()
    generate: Any = subject.module.generate
    for prompt in own_share(task.prompts):
        inputs = {name: tensor.to(subject.device) for name, tensor in subject.tokenize([prompt]).items()}
        answer = generate(
            **inputs,
            max_new_tokens=longest,
            do_sample=False,
            use_cache=True,
            pad_token_id=subject.tokenize.padding,
        )[0, inputs["input_ids"].shape[1] :]
        metric.update(len(answer), len(answer) < longest)
    return _computed(metric)


def _computed(metric: Metric | MetricCollection) -> dict[str, float]:
    """The measures over all processes' examples; this process may have had none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was called before the ``update``")
        found: Mapping[str, Tensor] = metric.compute()
    return {name: float(value) for name, value in found.items()}


def _in_order(outcomes: Mapping[int, tuple[float, float]]) -> Tensor:
    return torch.tensor([outcomes[i] for i in sorted(outcomes)], dtype=torch.float64)
