"""The merge's share of a step: materialise and inner products over plain forward and backward."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from tests.bench.__main__ import figure
from tests.bench.suite_model import many_experts, texts_of
from trainmerge.batch import Batch
from trainmerge.calibration import Tokenizer
from trainmerge.coefficients import Coefficients
from trainmerge.objectives import Entropy
from trainmerge.resident import Resident, load_resident
from trainmerge.task_vectors import Delta

EXPERTS, BATCH, MAX_LENGTH, ROUNDS = 8, 16, 64, 5
TOGETHER = 4  # tasks a backward, as in configs/


class Clock:
    """A method that adds up the seconds spent in it."""

    def __init__(self, method: Callable[..., object], now: Callable[[], float] = time.perf_counter) -> None:
        self.method, self.now, self.seconds = method, now, 0.0

    def of(self, instance: object, *arguments: object) -> object:
        """Call the method on an instance."""
        began = self.now()
        result = self.method(instance, *arguments)
        self.seconds += self.now() - began
        return result


def backwards(resident: Resident, batches: list[Batch], together: int) -> None:
    """Entropy's forwards and backwards of all tasks, `together` tasks a backward."""
    for first in range(0, len(batches), together):
        chosen = batches[first : first + together]
        torch.stack([Entropy()(resident(batch), batch).mean() for batch in chosen]).sum().backward()


def main() -> None:
    """Alternate plain and merging steps on the same batches; report medians."""
    with many_experts(EXPERTS) as recipe:
        opened = recipe.open()
        tokenize = Tokenizer(recipe.base, MAX_LENGTH)
        coefficients = Coefficients(tuple(recipe.experts), opened.layout)
        resident = load_resident(recipe, opened, coefficients, tokenize, Path())
        batches = []
        for k, name in enumerate(recipe.experts):
            inputs = tokenize(texts_of(recipe, name, BATCH))
            batches.append(Batch(k, inputs, inputs["attention_mask"].bool(), torch.arange(BATCH)))
        for together in (1, TOGETHER):
            measure(resident, batches, together)


def measure(resident: Resident, batches: list[Batch], together: int) -> None:
    """One setting of `tasks_per_backward`: the merge's seconds over the rest's, median of the rounds."""
    shares = []
    for _ in range(ROUNDS):
        merge, inner = Clock(Delta.merge), Clock(Delta.inner)
        with (
            patch.object(Delta, "merge", lambda *given, clock=merge: clock.of(*given)),
            patch.object(Delta, "inner", lambda *given, clock=inner: clock.of(*given)),
        ):
            began = time.perf_counter()
            resident.merged.materialise()
            backwards(resident, batches, together)
            whole = time.perf_counter() - began
        resident.merged.gradient()
        merging = merge.seconds + inner.seconds
        shares.append(merging / (whole - merging))
    name = "merge_share" if together == TOGETHER else "merge_share_a_task_a_backward"
    figure(name, statistics.median(shares), "ratio", "< 0.05" if together == TOGETHER else "")


if __name__ == "__main__":
    main()
