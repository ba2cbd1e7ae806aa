"""What crosses the link beside forwards: the same bits as from the device, and a bounded buffer.

A step merges every block before its forward, and takes the inner products of a gradient that has one value
for each weight, so that two steps have the same bits whatever the forwards' kernels do.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tests.contracts import assert_same_bits
from tests.gpu.llamas import SIZES, TINY, experts, model
from tests.gpu.setting import Row, Setting, row
from tests.gpu.steps import resident
from trainmerge.kernels import using
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.residency import Place
from trainmerge.task_vectors.prefetch import largest_block

EXPERTS, STEPS, POOL = 3, 4, 1 << 24
SENT: tuple[Place, ...] = ("host", "file")


def run(setting: Setting) -> Iterator[Row]:
    """Raises AssertionError where a copy was read too early, or was overwritten too early."""
    shape = TINY if setting.tiny else SIZES["135M"]
    module = model(shape, setting.device)
    vectors = experts(module, EXPERTS, 1 << 12 if setting.tiny else POOL)
    buffer = 2 * largest_block({name: delta.nbytes for name, delta in vectors.deltas.items()})
    inputs = torch.randint(50, (2, 8 if setting.tiny else 1024), device=setting.device)
    for backend in setting.backends:
        with using(backend):
            with resident(module, vectors, "device") as merged:
                want = [step(merged, inputs, i) for i in range(STEPS)]
            for place in SENT:
                with resident(module, vectors, place) as merged:
                    before = allocated(setting)
                    for i in range(STEPS):
                        for got, expected in zip(step(merged, inputs, i), want[i], strict=True):
                            assert_same_bits(got, expected)
                yield row(f"streams_{backend}_{place}_same", STEPS, "steps with the device's bits")
                if setting.cuda:
                    grown = torch.cuda.max_memory_allocated(setting.device) - before
                    yield row(f"streams_{backend}_{place}_peak_over_buffer", grown / buffer, "ratio")


def step(merged: MergedModel, inputs: Tensor, number: int) -> list[Tensor]:
    """The merge's sums of every weight, and the coefficients' gradient."""
    with torch.no_grad():
        merged.coefficients.raw.fill_(0.1 + 0.05 * number)
        merged.run([partial(forward, merged, inputs)], merge=True)
        sums = torch.stack([own.double().sum() for own in merged.module.parameters()]).cpu()
    parameters = [own for own in merged.module.parameters() if own.requires_grad]
    with merged.last_backward():  # gradients are collected as they arrive
        for own in parameters:
            own.square().sum().backward()  # type: ignore[no-untyped-call]
    return [sums, merged.gradient().cpu()]


def forward(merged: MergedModel, inputs: Tensor) -> Tensor:
    """Beside which the next block is sent."""
    logits: Tensor = merged.module(input_ids=inputs).logits
    return logits


def allocated(setting: Setting) -> int:
    """Bytes on a GPU, from which its peak is counted."""
    if not setting.cuda:
        return 0
    torch.cuda.synchronize(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    return torch.cuda.memory_allocated(setting.device)
