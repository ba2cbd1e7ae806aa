"""The buffers of full experts that differ from the base's, by the base's names: statistics of batch norms.

Buffers are never merged; a recipe's `buffers` says what becomes of these statistics.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainmerge.checkpoints.full_expert import FullExpert
from trainmerge.checkpoints.parameters import Parameters, fit_prefix
from trainmerge.checkpoints.sources import FullSource
from trainmerge.task_vectors.state_dicts import STATISTICS


def changed_buffers(frame: Parameters, plan: FullExpert) -> Iterator[tuple[str, FullSource]]:
    """The base's tensor and the expert's, of each floating-point buffer that the expert changed.

    Only the prefix of the headless model may differ between their names.
    """
    ours, own = frame.buffers, plan.parameters
    prefixes = sorted({frame.meta_model.base_model_prefix, own.meta_model.base_model_prefix})
    theirs = own.buffers
    fitted = {inside: name for name, inside in fit_prefix(theirs, ours, prefixes).items()}
    for buffer, name in ours.items():
        if buffer not in fitted:
            continue
        tensor = theirs[fitted[buffer]]
        if differ(frame.checkpoint.read(name), own.checkpoint.read(tensor)):
            yield name, FullSource(str(own.checkpoint.tensors[tensor].file), tensor)


def own_statistics(frame: Parameters, plan: FullExpert) -> dict[str, FullSource]:
    """The changed running means and variances of batch norms, by the base's tensors."""
    return {name: source for name, source in changed_buffers(frame, plan) if STATISTICS.search(name)}


def differ(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors differ in shape or in a value."""
    return ours.shape != theirs.shape or not torch.equal(ours.to(theirs.dtype), theirs)
