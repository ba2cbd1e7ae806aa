"""A dry run of a step's forwards and backwards: their memory and their operations.

The model's own code and the fit's objective run on fake tensors, which have a shape and a device but no
storage. So a plan needs no formula per architecture, and the dry run of a 70B model takes a few hundred MB.

Legend: `B` examples, `T` tokens.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from trainmerge.data.batch import Asks, Batch, Outputs, Predictions, Signals
from trainmerge.data.classifier import Classifier
from trainmerge.data.heads import Head
from trainmerge.model.embedding import Embedding
from trainmerge.model.forward import build_classifier, forward
from trainmerge.model.own_head import OwnModel
from trainmerge.model.turns import in_turns
from trainmerge.model.units import units
from trainmerge.objectives import Objective
from trainmerge.plan.fake_model import make_fake, make_rest_fake
from trainmerge.plan.ledger import Ledger


class DryRun(NamedTuple):
    """The needs of one step's forwards and backwards, in addition to the model's weights."""

    activations: int  # peak bytes saved by forwards for their backward
    peak: int  # peak bytes: activations, gradients, and operators' temporaries
    flops: int  # of matrix products, convolutions and attention; a multiply-add counts two


def dry_run(
    module: nn.Module,
    trained: Collection[str],
    rounds: Sequence[Sequence[Batch]],
    objective: Objective,
    heads: Mapping[int, Head | OwnModel] | None = None,
    dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    recorded: int = 0,
    embedding: Embedding | None = None,
    turns: bool = False,
) -> DryRun:
    """Run every round, forwards of its batches and one backward, on fake tensors.

    All positions are assumed unmasked. `module` may be on the meta device; its tensors become fake ones.

    Args:
        module: The model; afterwards it can be used for dry runs only.
        trained: Its parameters that require gradients; each gradient is freed as soon as it is complete.
        rounds: The batches whose losses share a backward, in order.
        objective: The loss; the expert outputs that it needs are placeholders.
        heads: The tasks' heads, by expert, own ones over `module`; empty for language models.
        dtypes: The parameters' dtypes, by name, or one for all.
        precision: The fit's autocast.
        recorded: Recorded probabilities of an expert per row; 0 is all of them.
        embedding: How the model embeds sentences, if the objective needs that.
        turns: Whether forwards of a round take turns, as behind a link (`MergedWeights.run`).

    Raises:
        ValueError: the model's forward depends on tensor values, which fake tensors lack, or needs inputs
            that `rounds` have not.
    """
    try:
        with _silent():
            return _on_fake_tensors(
                module, trained, rounds, objective, heads or {}, dtypes, precision, recorded, embedding, turns
            )
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{type(module).__name__} cannot be dry-run: its forward depends on tensor values ({error})"
        ) from error
    except Exception as error:  # of any type: the model's own code, and torch's kernels without storage
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{type(module).__name__} cannot be dry-run: {reason}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """In this context torch does not log the tracebacks of kernels that fake tensors lack."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _on_fake_tensors(
    module: nn.Module,
    trained: Collection[str],
    rounds: Sequence[Sequence[Batch]],
    objective: Objective,
    heads: Mapping[int, Head | OwnModel],
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    precision: Callable[[], AbstractContextManager[Any]],
    recorded: int,
    embedding: Embedding | None,
    turns: bool,
) -> DryRun:
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = make_fake(module, dtypes)
        for head in heads.values():
            if isinstance(head, OwnModel):
                make_rest_fake(head.module, made, next(module.parameters()).dtype)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained:
                parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
        classifiers = {k: _classifier(head, module) for k, head in heads.items()}
        ledger = Ledger([*module.parameters(), *module.buffers()])
        activations = 0
        for batches in rounds:
            with ledger, precision():
                tasks = [
                    partial(
                        _loss, module, batch, objective, classifiers.get(batch.expert), recorded, embedding
                    )
                    for batch in batches
                ]
                losses = in_turns(units(module), tasks) if turns else [task() for task in tasks]
                activations = max(activations, ledger.now)
            with ledger:
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            del losses
    return DryRun(activations, ledger.peak, ledger.flops)


def _loss(
    module: nn.Module,
    batch: Batch,
    objective: Objective,
    classifier: Classifier | OwnModel | None,
    recorded: int,
    embedding: Embedding | None,
) -> Tensor:
    fake = batch._replace(
        inputs={name: torch.empty_like(value) for name, value in batch.inputs.items()},
        mask=torch.empty_like(batch.mask),
    )
    outputs = forward(module, fake, classifier, objective.asks.layers, embedding)
    return objective(outputs, fake._replace(teacher=_signals(objective.asks, outputs, recorded))).mean()


def _signals(asks: Asks, outputs: Outputs, recorded: int) -> Signals:
    """Placeholders of an expert's recorded outputs."""
    hidden = {i: state.flatten(0, -2).to(asks.dtype) for i, state in outputs.hidden.items()}
    if asks.temperature is None:
        embedding = None if outputs.embedding is None else outputs.embedding.detach()
        return Signals(None, hidden, embedding=embedding)
    if outputs.kind == "values":
        return Signals(None, hidden, torch.empty(outputs.logits.shape))
    rows, classes = outputs.logits.shape[:-1].numel(), outputs.logits.shape[-1]
    if not 0 < recorded < classes or outputs.kind in ("spans", "labels"):
        return Signals(Predictions(torch.empty(rows, classes)), hidden)
    tokens = torch.empty(rows, recorded, dtype=torch.int32)
    return Signals(Predictions(torch.empty(rows, recorded), tokens, torch.empty(rows)), hidden)


def _classifier(head: Head | OwnModel, module: nn.Module) -> Classifier | OwnModel | None:
    if isinstance(head, OwnModel):
        return head
    with torch.no_grad():
        return build_classifier(head, module, _short)


def _short(texts: Sequence[str]) -> Mapping[str, Tensor]:
    """Label texts as a few tokens; a head's shape depends only on their number."""
    return dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(len(texts), 4, dtype=torch.int64))


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
