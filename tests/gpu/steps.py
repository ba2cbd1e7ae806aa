"""The merge's share of a step of random Llamas, and the same loop with the merge inside the autograd graph.

A step takes one batch of each expert, one backward a batch, gradients kept. The share is the step's time over
that of the same forwards and backwards without merging, minus 1. The plain loop merges once a step in
float32, as fusion_bench's does, with all task vectors dense on the device.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.gpu.llamas import SIZES, TINY, experts, model
from tests.gpu.setting import Row, Setting, row
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import using
from trainmerge.model.functional import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.objectives.entropy import entropy
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.link import each_tensor

EXPERTS, BATCH, TOKENS, ROUNDS = (3, 8), 2, 512, 3


def run(setting: Setting) -> Iterator[Row]:
    """Every size and number of experts; what does not fit the device is said."""
    sizes = {"tiny": TINY} if setting.tiny else SIZES
    for name, shape in sizes.items():
        for count in EXPERTS[:1] if setting.tiny else EXPERTS:
            yield from measured(setting, f"{name}_{count}", shape, count)


def measured(setting: Setting, case: str, shape: dict[str, object], count: int) -> Iterator[Row]:
    """The figures of one model."""
    module = model(shape, setting.device)
    vectors = experts(module, count, 1 << 12 if setting.tiny else 1 << 28)
    size = (BATCH, 8 if setting.tiny else TOKENS)
    batches = torch.randint(int(str(shape["vocab_size"])), (count, *size), device=setting.device)
    coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes), 0.3)
    merged = MergedModel(module, vectors, coefficients, keep_gradients=True)
    plain = setting.seconds(partial(backwards, merged, batches), ROUNDS)
    ours, peaks = {}, {}
    for backend in setting.backends:
        with using(backend):
            ours[backend], peaks[backend] = with_peak(setting, partial(step, merged, batches))
        share = ours[backend] / plain - 1
        yield row(f"merge_share_{backend}_host_{case}", share, "of forwards and backwards")
    del merged
    seconds, peak = autograd(setting, module, vectors, batches)
    fastest = min(ours, key=lambda backend: ours[backend])
    short = "autograd's does not fit the device"
    ratio = None if seconds is None else seconds / ours[fastest]
    yield row(f"autograd_over_ours_seconds_{case}", ratio, "ratio" if ratio else short)
    if setting.cuda:
        ratio = None if peak is None else peak / peaks[fastest]
        yield row(f"autograd_over_ours_peak_{case}", ratio, "ratio" if ratio else short)


def backwards(merged: MergedModel, batches: Tensor) -> None:
    """Forwards and backwards only; the gradients are dropped at the end."""
    for batch in batches:
        entropy(merged.module(input_ids=batch).logits).mean().backward()
    merged.module.zero_grad(set_to_none=True)


def step(merged: MergedModel, batches: Tensor) -> None:
    """Of a fit, up to the coefficients' gradient."""
    merged.materialise()
    for batch in batches:
        entropy(merged.module(input_ids=batch).logits).mean().backward()
    merged.gradient()


def with_peak(setting: Setting, call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a call, and the highest number of bytes allocated on a GPU meanwhile."""
    if setting.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = setting.seconds(call, ROUNDS)
    return seconds, torch.cuda.max_memory_allocated(setting.device) if setting.cuda else 0


def autograd(
    setting: Setting, module: nn.Module, vectors: TaskVectors, batches: Tensor
) -> tuple[float | None, int | None]:
    """Seconds and peak bytes of the same step by autograd; None where the device is too small."""
    module.requires_grad_(False)
    try:
        deltas = {n: each_tensor(d, lambda t: t.to(setting.device)) for n, d in vectors.deltas.items()}
        here = TaskVectors(vectors.experts, deltas)
        coefficients = Coefficients(here.experts, Grouping().layout(here.shapes), 0.3).to(setting.device)

        def one() -> None:
            weights = merged_weights(here, coefficients)
            for i, batch in enumerate(batches):
                output = functional_call(module, weights, (), {"input_ids": batch})
                entropy(output.logits).mean().backward(retain_graph=i + 1 < len(batches))
            coefficients.zero_grad()

        return with_peak(setting, one)
    except torch.cuda.OutOfMemoryError:
        return None, None
