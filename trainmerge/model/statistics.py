"""A merge's own statistics of batch norms, measured with the resident model on calibration examples."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trainmerge.data.batch import Batch
from trainmerge.data.calibration import Calibration
from trainmerge.data.examples import Example
from trainmerge.model.batch_norm import batch_norm_statistics
from trainmerge.model.resident import Resident

BATCH = 32  # examples at most, of one expert


def reestimated(resident: Resident, data: Calibration) -> dict[str, Tensor]:
    """The running means and variances [F] of the resident model at its current weights, by the base's files.

    They are the mean over batches of each batch's statistics, over all examples of all experts: as those of
    `batch_norm_statistics` with batches of at most 32 examples. The resident model is as it was afterwards.

    Raises:
        ValueError: the model has no batch norm with running statistics.
    """
    found = batch_norm_statistics(resident.merged.module, _batches(resident, data), lambda _, b: resident(b))
    return {name: found[buffer] for name, buffer in resident.buffers.items() if buffer in found}


def statistics_at(resident: Resident, values: Tensor | None, data: Calibration) -> dict[str, Tensor]:
    """`reestimated` of the merge at coefficients that expand to [K, G]; None: its own."""
    merged = resident.merged
    own = merged.coefficients().detach()
    with merged.at(own if values is None else values.expand_as(own)):
        return reestimated(resident, data)


def _batches(resident: Resident, data: Calibration) -> Iterator[Batch]:
    for k, examples in enumerate(data.examples):
        for part in even_parts(examples, BATCH):
            yield resident.batch(k, part, data.tokenize)


def even_parts(examples: Sequence[Example], most: int) -> Iterator[Sequence[Example]]:
    """The examples in order, in as few parts of at most `most` as there can be, whose sizes differ by 1.

    >>> [len(part) for part in even_parts(range(70), 32)]
    [24, 23, 23]
    """
    parts = -(-len(examples) // most)
    size, longer = divmod(len(examples), max(1, parts))
    begin = 0
    for number in range(parts):
        end = begin + size + (number < longer)
        yield examples[begin:end]
        begin = end
