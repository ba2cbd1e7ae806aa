"""Steps on a stand-in device behind a link: what is sent, and what a step takes.

Blocks of one linear layer, three experts. The link counts bytes and sends no more of them a second than it is
told; a block computes for as long as it is told, asleep, so that a busy machine changes little. The bound is
the longer of the two: a step without a link, and the bytes of a step over the link. The limit is that of
exact schedules (`plan.overlap`): forwards, a third of the computing, cover the merge's bytes.
"""

import statistics
import time
from copy import deepcopy
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.bench.__main__ import figure
from tests.stand_in import CountedLink, behind
from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.data.batch import Batch
from trainmerge.fitting.foresight import foresight
from trainmerge.fitting.step_gradient import StepGradient
from trainmerge.kernels import ExpertWeight
from trainmerge.model import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.residency import Room, Share, Vectors, reside
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.plan.overlap import Computing, Pass, merging_seconds
from trainmerge.task_vectors.delta import Delta, TaskVectors

EXPERTS, BLOCKS, WIDTH, STEPS = 3, 24, 64, 4
TURNS, SUMS = StepSchedule(EXPERTS), StepSchedule(1, keep=True)
FORWARD = 4e-3  # seconds of a block's forward; its backward takes twice as long
SPEEDS = {"eighth": 8.0, "half": 2.0, "equal": 1.0, "double": 0.5, "eightfold": 1 / 8}  # sending / computing


class Taking(torch.autograd.Function):
    """The identity, after as long as a block of a large model would take."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        """A forward's time."""
        time.sleep(FORWARD)
        return values.clone()

    @staticmethod
    def backward(_: Any, *slopes: Tensor) -> Tensor:
        """A backward's time."""
        time.sleep(2 * FORWARD)
        return slopes[0]


class Block(nn.Linear):
    """A linear layer that takes its time."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        return Taking.apply(super().forward(input).tanh())


def model_and_vectors() -> tuple[nn.Module, TaskVectors]:
    """A base in memory, and experts near it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)))
    deltas = {}
    for name, parameter in model.named_parameters():
        base = parameter.detach().clone()
        experts = (ExpertWeight(base + 1e-3 * torch.randn(base.shape)) for _ in range(EXPERTS))
        deltas[name] = Delta(base, tuple(experts))
    return model, TaskVectors(tuple(f"expert{k}" for k in range(EXPERTS)), deltas)


def step(
    merged: MergedModel, inputs: Tensor, schedule: StepSchedule = TURNS, optimizer: Optimizer | None = None
) -> float:
    """Seconds of a merge, the tasks' forwards and backwards, and the coefficients' gradient.

    With an optimizer its step too, and the next merge in the backward.
    """
    coefficients = merged.coefficients

    def loss(batch: Batch) -> Tensor:
        return merged.module(inputs[batch.expert]).square().mean()

    start = coefficients().detach()
    predict = foresight(coefficients, optimizer, Anchor(), start, 0.0) if optimizer else None
    names = [str(k) for k in range(EXPERTS)]
    whole = StepGradient(merged, names, loss, Tensor.backward, Tensor.clone, schedule, None, predict)
    batches = [Batch(k, {}, torch.ones(0, 0), torch.arange(0)) for k in range(EXPERTS)]
    began = time.perf_counter()
    _, coefficients.raw.grad = whole(batches, 0)
    if optimizer:
        optimizer.step()
        merged.settle()
    return time.perf_counter() - began


def built(model: nn.Module, vectors: TaskVectors, where: Vectors, link: CountedLink) -> MergedModel:
    """The merge of a copy of the module, with task vectors held there; `auto` has room for half of them."""
    shares = {name: Share(delta.nbytes) for name, delta in vectors.deltas.items()}
    half = Room(sum(share.nbytes for share in shares.values()) // 2, 0, link=1.0, bandwidth=2.0)
    residency = reside(where, shares, half if where == "auto" else None)
    coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes))
    with patch.object(merged_weights, "link_to", behind(link)):
        return MergedModel(deepcopy(model), vectors, coefficients, keep_gradients=True, residency=residency)


def sends(model: nn.Module, vectors: TaskVectors, inputs: Tensor) -> None:
    """What a fit sends in its first step, and in a later one, as a share of base and task vectors."""
    whole = sum(delta.nbytes for delta in vectors.deltas.values())
    for where in get_args(Vectors):
        link = CountedLink()
        merged = built(model, vectors, where, link)
        step(merged, inputs)
        first = link.bytes
        step(merged, inputs)
        if where == "device":
            figure("sent_per_fit_device", link.bytes / whole, "of base and task vectors", "1")
            figure("held_over_planned_device", link.alive / whole, "ratio", "0.95 to 1.05")
        else:
            figure(f"sent_per_step_{where}", (link.bytes - first) / whole, "of base and task vectors", "")
    link = CountedLink()
    merged = built(model, vectors, "host", link)
    optimizer = adam(merged)
    step(merged, inputs, optimizer=optimizer)
    first = link.bytes
    step(merged, inputs, optimizer=optimizer)
    figure("sent_per_step_one_pass", (link.bytes - first) / whole, "of base and task vectors", "1")


def times(model: nn.Module, vectors: TaskVectors, inputs: Tensor) -> None:
    """A step over its bound, where the link is slower than the computing, and where it is faster."""
    link = CountedLink()
    near, far = (built(model, vectors, "device", CountedLink()), built(model, vectors, "host", link))
    step(near, inputs)
    step(far, inputs)
    link.restart()
    step(far, inputs)
    computing, sent = step(near, inputs), link.bytes
    for speed, share in SPEEDS.items():
        link.rate = sent / (share * computing)
        ratio, over_limit = ratios(near, far, inputs, sent / link.rate, TURNS)
        figure(f"step_over_bound_link_{speed}", ratio, "ratio", "1.15")
        figure(f"step_over_limit_link_{speed}", over_limit, "ratio", "1.15")
        ratio, over_paper = one_pass(near, far, inputs, link)
        figure(f"one_pass_over_bound_link_{speed}", ratio, "ratio", "1.15")
        figure(f"one_pass_over_paper_link_{speed}", over_paper, "ratio", "1.15")
    link.rate = sent / computing
    ratio, over_limit = ratios(near, far, inputs, computing, SUMS)
    figure("step_over_bound_accumulated", ratio, "ratio", "")
    figure("step_over_paper_accumulated", over_limit, "ratio", "")


def ratios(
    near: MergedModel, far: MergedModel, inputs: Tensor, sending: float, schedule: StepSchedule
) -> tuple[float, float]:
    """A step over its bound, and over the schedule's time on paper, where both passes send for `sending`."""
    pairs = [(step(near, inputs, schedule), step(far, inputs, schedule)) for _ in range(STEPS)]
    without, with_link = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    backwards, one = -(-EXPERTS // schedule.tasks), Pass(0.0, sending / 2)
    paper = without + merging_seconds(Computing(without, backwards), one, one, 1)
    return with_link / max(without, sending), with_link / paper


def adam(merged: MergedModel) -> Optimizer:
    """The optimizer of a merge's coefficients."""
    return torch.optim.Adam(merged.coefficients.parameters(), lr=1e-3)


def one_pass(near: MergedModel, far: MergedModel, inputs: Tensor, link: CountedLink) -> tuple[float, float]:
    """A step whose merge is written in the backward before, over its bound, and over its time on paper."""
    optimizer = adam(far)
    step(far, inputs, optimizer=optimizer)  # its merge takes two passes
    before = link.bytes
    pairs = [(step(near, inputs), step(far, inputs, optimizer=optimizer)) for _ in range(STEPS)]
    sending = (link.bytes - before) / STEPS / link.rate
    without, with_link = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    paper = without + merging_seconds(Computing(without), Pass(0.0), Pass(0.0, sending), 1)
    far.standing.stop()
    return with_link / max(without, sending), with_link / paper


def main() -> None:
    """What is sent, then how long steps take."""
    model, vectors = model_and_vectors()
    inputs = torch.randn(EXPERTS, 4, WIDTH)
    sends(model, vectors, inputs)
    times(model, vectors, inputs)


if __name__ == "__main__":
    main()
