"""Merges written in the backward before: the same bits, one pass per step, and what falls back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contracts import assert_same_bits
from tests.stand_in import CountedLink, behind
from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Box, Constraint, Sigmoid
from trainmerge.coefficients.layout import Grouping
from trainmerge.data.batch import Batch
from trainmerge.fitting.foresight import foresight
from trainmerge.fitting.step_gradient import StepGradient
from trainmerge.kernels import Difference, ExpertWeight
from trainmerge.model import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.residency import Share, Vectors, reside
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.task_vectors import prefetch
from trainmerge.task_vectors.delta import TaskVectors

TASKS, STEPS, BLOCKS = 3, 4, 8  # three: a sum of two gradients has the same bits in any order
TOGETHER = StepSchedule(TASKS)


def adam(values: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(values, lr=0.02)


class Net(nn.Module):
    """An embedding that is the head too, and blocks; `uses` says how a forward reads these."""

    def __init__(self, uses: str = "calls") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(BLOCKS))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.uses = uses

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = self._run(block, x)
        if (
            self.uses == "loops"
        ):  # the first block's gradient is complete in the last frame, then in the first
            x = checkpoint(self.blocks[0], x, use_reentrant=True)
        return self.head(x)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        match self.uses:
            case "recomputes":
                return checkpoint(block, x, use_reentrant=False)
            case "recomputes within" | "loops":
                return checkpoint(block, x, use_reentrant=True)
            case "reads apart":  # the backward of this read comes after the gradient of the others
                return block(x @ block[0].weight.detach())
        return block(x)


class Fit:
    """Steps of a merge of `module` on a stand-in device."""

    def __init__(
        self,
        module: nn.Module,
        vectors: TaskVectors,
        ahead: bool,
        where: Vectors = "host",
        optimizer: Callable[[Any], torch.optim.Optimizer] = adam,
        grouping: Grouping = Grouping(),  # noqa: B008 - frozen
        constraint: Constraint | None = None,
        anchor: Anchor = Anchor(),  # noqa: B008 - frozen
        schedule: StepSchedule = TOGETHER,
        linked: bool = True,
    ) -> None:
        self.link, self.ahead, self.anchor, self.schedule = CountedLink(), ahead, anchor, schedule
        shares = {name: Share(delta.nbytes) for name, delta in vectors.deltas.items()}
        self.coefficients = Coefficients(vectors.experts, grouping.layout(vectors.shapes), 0.3, constraint)
        with pytest.MonkeyPatch.context() as patch:
            if linked:
                patch.setattr(merged_weights, "link_to", behind(self.link))
            place = {"residency": reside(where, shares), "keep_gradients": schedule.keep}
            self.merged = MergedModel(copy.deepcopy(module), vectors, self.coefficients, **place)
        self.optimizer = optimizer(self.coefficients.parameters())
        self.start, self.whole = self.coefficients().detach().clone(), sum(s.nbytes for s in shares.values())

    def step(self, disturb: float = 0.0) -> float:
        """A step; what it sends, as a share of base and task vectors. `disturb` is added to coefficients."""
        before = self.link.bytes
        predict = foresight(self.coefficients, self.optimizer, self.anchor, self.start, 0.0)
        assert predict is not None
        names = [f"task{k}" for k in range(TASKS)]
        gradient = StepGradient(
            self.merged, names, self.loss, Tensor.backward, Tensor.clone, self.schedule, None,
            predict if self.ahead else None,
        )  # fmt: skip

        def closure() -> float:
            _, slopes = gradient([Batch(k, {}, torch.ones(0, 0), torch.arange(0)) for k in range(TASKS)], 0)
            self.optimizer.zero_grad()
            return float(gradient.assign(slopes, self.anchor, self.start, 0.0))

        self.optimizer.step(closure)
        self.coefficients.project_()
        self.coefficients.raw.data += disturb
        self.merged.settle()
        return (self.link.bytes - before) / self.whole

    def loss(self, batch: Batch) -> Tensor:
        return self.merged.module(torch.arange(batch.expert, batch.expert + 6)).logsumexp(-1).sum()

    def weights(self) -> list[Tensor]:
        """As they are now."""
        return [own.detach().clone() for own in self.merged.module.parameters()]


def both(module: nn.Module, random_task_vectors, **settings: Any) -> tuple[list[float], list[float]]:
    """What each step sends in two passes, and in one: whose coefficients and weights have the same bits."""
    vectors = random_task_vectors(module, [ExpertWeight, Difference])
    two, one = (Fit(module, vectors, ahead, **settings) for ahead in (False, True))
    sent: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        for fit, own in zip((two, one), sent, strict=True):
            own.append(fit.step())
        two.merged.materialise()
        if not one.merged.standing.on:  # then the next step writes it
            one.merged.materialise()
        assert_same_bits(one.coefficients.raw.detach(), two.coefficients.raw.detach())
        for got, want in zip(one.weights(), two.weights(), strict=True):
            assert_same_bits(got, want)
    assert bool((one.coefficients() != one.start).any())
    return sent


@pytest.mark.parametrize("where", ["file", "host"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": lambda values: torch.optim.AdamW(values, lr=0.02, weight_decay=0.1)},
        {"optimizer": lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9)},
        {"constraint": Box(0.25, 0.32)},
        {"anchor": Anchor(0.1, power=2)},
        {"grouping": Grouping("block")},
        {"grouping": Grouping("chunk", chunks=3)},
        {"schedule": StepSchedule(1, keep=True)},
    ],
    ids=["Adam", "AdamW", "SGD", "Box", "anchor", "blocks", "chunks", "kept"],
)
def test_every_task_vector_is_sent_once_per_step(
    where: Vectors, settings: dict[str, Any], random_task_vectors
) -> None:
    two, one = both(Net(), random_task_vectors, where=where, **settings)
    assert one[1:] == pytest.approx([1.0] * (STEPS - 1), abs=0.05)
    assert min(two) > 1.6


def test_each_backward_of_a_step_is_a_pass_and_the_merge_is_none(random_task_vectors) -> None:
    _, one = both(Net(), random_task_vectors, schedule=StepSchedule(1))
    assert one[1:] == pytest.approx([float(TASKS)] * (STEPS - 1), abs=0.05)


@pytest.mark.parametrize(
    ("uses", "schedule"), [("recomputes", TOGETHER), ("recomputes within", StepSchedule(1, keep=True))]
)
def test_recomputed_blocks_read_the_weights_of_their_step(
    uses: str, schedule: StepSchedule, random_task_vectors
) -> None:
    _, one = both(Net(uses), random_task_vectors, schedule=schedule)
    assert max(one[1:]) < 1.05


@pytest.mark.parametrize(
    ("uses", "schedule", "one_pass"),
    [
        ("loops", StepSchedule(1, keep=True), True),
        ("reads apart", TOGETHER, False),
        ("recomputes within", TOGETHER, False),  # each task's frame has a backward of its own
    ],
)
def test_a_read_after_the_next_merge_finds_the_weights_of_its_step(
    uses: str, schedule: StepSchedule, one_pass: bool, random_task_vectors
) -> None:
    """Such a weight is merged after the step from then on; if most are, a backward merges none."""
    two, one = both(Net(uses), random_task_vectors, schedule=schedule)
    assert one[0] > 2  # some were sent again
    if one_pass:  # the first block, a ninth, is read again: for its second product, and after the step
        assert max(one[1:]) < 1.3
    else:
        assert one[2:] == two[2:]


def test_a_wrong_prediction_changes_nothing_and_ends_it(random_task_vectors) -> None:
    vectors = random_task_vectors(net := Net(), [ExpertWeight, Difference])
    two, one = (Fit(net, vectors, ahead) for ahead in (False, True))
    for _ in range(STEPS):
        sent = [fit.step(disturb=0.01) for fit in (two, one)]
        assert_same_bits(one.coefficients.raw.detach(), two.coefficients.raw.detach())
    assert sent[1] == sent[0]


def test_what_others_write_is_written_over(random_task_vectors) -> None:
    vectors = random_task_vectors(net := Net(), [ExpertWeight, Difference])
    two, one = (Fit(net, vectors, ahead) for ahead in (False, True))
    for fit in (two, one):
        fit.step()
        with torch.no_grad():
            fit.merged.module.blocks[2][0].weight.zero_()
        fit.step()
        with fit.merged.teacher(1), fit.merged.at(torch.zeros_like(fit.start)):
            pass
        fit.step()
    assert_same_bits(one.coefficients.raw.detach(), two.coefficients.raw.detach())


def test_one_coefficient_for_all_takes_two_passes(random_task_vectors) -> None:
    two, one = both(Net(), random_task_vectors, grouping=Grouping("task"))
    assert one == two


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adam])
def test_only_elementwise_steps_are_foreseen(optimizer: type[torch.optim.Optimizer]) -> None:
    layout = Grouping().layout({"w": torch.Size([2])})
    coefficients, curved = Coefficients(["a"], layout), Coefficients(["a"], layout, constraint=Sigmoid())
    assert foresight(curved, torch.optim.Adam(curved.parameters()), Anchor(), curved(), 0.0) is None
    own = optimizer(coefficients.parameters())
    start = coefficients().detach()
    found = [foresight(coefficients, own, Anchor(), start, clip) is not None for clip in (0.0, 1.0)]
    assert found == [optimizer is torch.optim.Adam, False]


def test_files_larger_than_a_processor_s_memory(random_task_vectors, monkeypatch) -> None:
    monkeypatch.setattr(prefetch, "available", lambda: 0)
    asked: list[int] = []
    monkeypatch.setattr(prefetch, "read_ahead", lambda part: asked.append(part.nbytes))
    vectors = random_task_vectors(Net(), [ExpertWeight, Difference])
    fits = [Fit(Net(), vectors, ahead, where="file", linked=False) for ahead in (False, True)]
    read: list[list[int]] = []
    for fit in fits:
        read.append([])
        for _ in range(STEPS):
            fit.step()
            read[-1].append(sum(asked))
            asked.clear()
    two, one = fits
    assert one.merged.standing.on
    assert_same_bits(one.coefficients().detach(), two.coefficients().detach())
    assert sum(read[1][1:]) < 0.7 * sum(read[0][1:])
