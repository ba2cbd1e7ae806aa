"""The merge's share of a step of random Llamas, and the same loop with the merge inside the autograd graph.

A step takes one batch of each expert, one backward a batch, gradients kept. The share is the step's time
over that of the same forwards and backwards without merging, minus 1, with base and task vectors on the
device (exact, and in the form of `Int8`), in pinned host memory, and in pageable memory, as mapped files are.
Where they are sent, `turns_share` is that of one backward for all batches, whose forwards take turns.
The plain loop merges once per step in float32, as fusion_bench's does, with all task vectors dense on the
device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.gpu.llamas import POOL, SIZES, TINY, experts, model
from tests.gpu.setting import Row, Setting, row
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import using
from trainmerge.model.functional import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.residency import Place, Residency
from trainmerge.objectives.entropy import entropy
from trainmerge.system.memory import available
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.link import each_tensor

EXPERTS, BATCH, TOKENS, ROUNDS = (3, 8), 2, 512, 3
PLACES: dict[str, Place] = {"device": "device", "int8": "device", "host": "host", "file": "file"}


def run(setting: Setting) -> Iterator[Row]:
    """Every size and number of experts; what does not fit the device is said."""
    sizes = {"tiny": TINY} if setting.tiny else SIZES
    for name, shape in sizes.items():
        for count in EXPERTS[:1] if setting.tiny else EXPERTS:
            yield from measured(setting, f"{name}_{count}", shape, count)


def measured(setting: Setting, case: str, shape: dict[str, object], count: int) -> Iterator[Row]:
    """The figures of one model."""
    module = model(shape, setting.device)
    pool = 1 << 12 if setting.tiny else POOL
    size = (BATCH, 8 if setting.tiny else TOKENS)
    batches = torch.randint(int(str(shape["vocab_size"])), (count, *size), device=setting.device)
    plain = setting.seconds(partial(backwards, module.requires_grad_(True), batches), ROUNDS)
    best: tuple[float, int] | None = None  # seconds and peak bytes of the fastest
    for place, held in PLACES.items():
        vectors = experts(module, count, pool, int8=place == "int8")
        for backend in setting.backends if held == "device" else setting.backends[-1:]:
            name = f"merge_share_{backend}_{place}_{case}"
            if too_large(setting, vectors, held):
                yield row(name, None, "does not fit")
                continue
            with using(backend), resident(module, vectors, held) as merged:
                own = with_peak(setting, partial(step, merged, batches))
                share = turns_share(setting, merged, batches, plain) if held != "device" else None
            yield row(name, own[0] / plain - 1, "of forwards and backwards")
            if held != "device":
                unit = "does not fit" if share is None else "of forwards and backwards"
                yield row(f"turns_share_{backend}_{place}_{case}", share, unit)
            if place != "int8":
                best = min(best or own, own)
    assert best is not None  # files always fit
    seconds, peak = autograd(setting, module, experts(module, count, pool), batches)
    short = "autograd's does not fit the device"
    ratio = None if seconds is None else seconds / best[0]
    yield row(f"autograd_over_ours_seconds_{case}", ratio, "ratio" if ratio else short)
    if setting.cuda:
        ratio = None if peak is None else peak / best[1]
        yield row(f"autograd_over_ours_peak_{case}", ratio, "ratio" if ratio else short)


@contextmanager
def resident(module: nn.Module, vectors: TaskVectors, held: Place) -> Iterator[MergedModel]:
    """The merge with all base and task vectors at one place, until the end of this context."""
    coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes), 0.3)
    residency = Residency(dict.fromkeys(vectors.deltas, held))
    merged = MergedModel(module, vectors, coefficients, keep_gradients=True, residency=residency)
    yield merged
    for hook in merged._hooks:  # they would keep its copies alive
        hook.remove()


def too_large(setting: Setting, vectors: TaskVectors, held: Place) -> bool:
    """Whether the place has no room for all of them; a tenth of a GPU is left to the step."""
    needed = sum(delta.nbytes for delta in vectors.deltas.values())
    if held == "device" and setting.cuda:
        free, whole = torch.cuda.mem_get_info(setting.device)
        return needed + sum(delta.base.nbytes for delta in vectors.deltas.values()) > free - whole // 10
    return held == "host" and needed > (available() or 2 * needed) // 2


def backwards(module: nn.Module, batches: Tensor) -> None:
    """Forwards and backwards only; the gradients are dropped at the end."""
    for batch in batches:
        entropy(module(input_ids=batch).logits).mean().backward()
    module.zero_grad(set_to_none=True)


def step(merged: MergedModel, batches: Tensor) -> None:
    """Of a fit, up to the coefficients' gradient."""
    for i, batch in enumerate(batches):
        (loss,) = merged.run([partial(loss_of, merged.module, batch)], merge=i == 0)
        with merged.last_backward() if i == len(batches) - 1 else nullcontext():
            loss.backward()  # type: ignore[no-untyped-call]
    merged.gradient()


def turns(merged: MergedModel, batches: Tensor) -> None:
    """The same with one backward."""
    losses = merged.run([partial(loss_of, merged.module, batch) for batch in batches], merge=True)
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    merged.gradient()


def loss_of(module: nn.Module, batch: Tensor) -> Tensor:
    """The entropy of one batch."""
    return entropy(module(input_ids=batch).logits).mean()


def turns_share(setting: Setting, merged: MergedModel, batches: Tensor, plain: float) -> float | None:
    """The merge's share of a step in turns; None if the activations of all batches do not fit."""
    try:
        return setting.seconds(partial(turns, merged, batches), ROUNDS) / plain - 1
    except torch.OutOfMemoryError:
        return None


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
