"""Forwards that take turns: their order, what they inherit, their errors, and the same gradient."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.contracts import assert_same_bits, relative_error
from tests.gradient_sweep import FAMILIES, FORMS, LIMIT, loss, task_vectors
from tests.stand_in import CountedLink, behind
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import Difference, ExpertWeight
from trainmerge.model import merged_weights
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.residency import Residency, Share, Vectors, reside
from trainmerge.model.turns import Turns, in_turns
from trainmerge.model.units import units
from trainmerge.task_vectors.delta import TaskVectors

TASKS = 3


def test_one_at_a_time_in_a_fixed_order() -> None:
    turns, seen = Turns(), []

    def run(task: int, count: int) -> int:
        for i in range(count):
            seen.append((task, i))
            turns.pass_on()
        return 10 * task

    turns.pass_on()  # of no turn: nothing
    assert turns.run([partial(run, 0, 3), partial(run, 1, 1), partial(run, 2, 2)]) == [0, 10, 20]
    assert seen == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]


def test_an_error_ends_the_others_first() -> None:
    turns, seen = Turns(), []

    def fails() -> None:
        turns.pass_on()
        raise KeyError("here")

    def goes_on() -> None:
        try:
            while True:
                turns.pass_on()
        finally:
            seen.append("ended")

    with pytest.raises(KeyError, match="here"):
        turns.run([fails, goes_on, goes_on])
    assert seen == ["ended", "ended"]


def test_modes_and_autocast_are_inherited() -> None:
    layer, ids = nn.Linear(3, 3), torch.ones(1, 3)

    def run() -> tuple[torch.dtype, bool]:
        with torch.autocast("cpu", enabled=False):
            pass  # its end does not clear the cache of casts
        out = layer(ids)
        return out.dtype, out.requires_grad

    assert in_turns([layer], [run, run]) == [(torch.float32, True)] * 2
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert in_turns([layer], [run, run]) == [(torch.bfloat16, False)] * 2
    with torch.device("meta"):
        assert in_turns([layer], [lambda: torch.ones(1).device.type]) == ["meta"]


def build(module: nn.Module, deltas: TaskVectors, link: CountedLink, vectors: Vectors) -> MergedModel:
    """The merge of a copy of the module; `auto` holds one parameter."""
    shares = {name: Share(delta.nbytes) for name, delta in deltas.deltas.items()}
    residency = reside(vectors, shares) if vectors != "auto" else Residency({next(iter(shares)): "device"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged_weights, "link_to", behind(link))
        coefficients = Coefficients(deltas.experts, Grouping().layout(deltas.shapes), 0.3)
        return MergedModel(copy.deepcopy(module), deltas, coefficients, residency=residency)


def losses(merged: MergedModel) -> list[Callable[[], Tensor]]:
    """One language model's losses on texts of different lengths."""

    def loss(task: int) -> Tensor:
        ids = torch.arange(4 + task)[None]
        return merged.module(ids).logits.float().logsumexp(-1).sum()

    return [partial(loss, task) for task in range(TASKS)]


@pytest.mark.parametrize("how", ["float64", "recomputed", "autocast"])
def test_the_same_bits_wherever_task_vectors_are(how: str, tiny_llama, random_task_vectors) -> None:
    if how == "recomputed":
        recompute_blocks(tiny_llama)
    if how == "float64":
        tiny_llama.double()
    deltas, found = random_task_vectors(tiny_llama, [ExpertWeight, Difference]), []
    for vectors in ("device", "host", "file", "auto"):
        merged = build(tiny_llama, deltas, CountedLink(), vectors)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                own = merged.run(losses(merged), merge=True)
            torch.stack(own).sum().backward()
            found.append((torch.stack(own).detach(), merged.gradient()))
    for own, gradient in found[1:]:
        assert_same_bits(own, found[0][0])
        assert_same_bits(gradient, found[0][1])
    one = MergedModel(copy.deepcopy(tiny_llama), deltas, merged.coefficients)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        alone = one.run(losses(one), merge=True)  # without a link they run one after the other
    torch.stack(alone).sum().backward()
    assert_same_bits(torch.stack(alone).detach(), found[0][0])
    if how == "float64":  # the same sums in another order
        torch.testing.assert_close(one.gradient(), found[0][1], rtol=1e-6, atol=1e-6)


def test_each_unit_is_merged_after_the_turns_of_the_one_before(tiny_llama, random_task_vectors) -> None:
    """And the backward completes a block's gradients before it reaches the next block's."""
    link = CountedLink()
    deltas = random_task_vectors(tiny_llama, [ExpertWeight, Difference])
    merged, seen = build(tiny_llama, deltas, link, "file"), []
    blocks = merged.module.model.layers
    assert [unit for unit in units(merged.module) if unit in set(blocks)] == [*blocks]
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append((number, link.arrivals)))
        block.register_full_backward_hook(lambda *_, number=number: seen.append((number, -1)))
    own = merged.run(losses(merged), merge=True)
    forwards = seen.copy()
    assert [number for number, _ in forwards] == [n for n in range(len(blocks)) for _ in range(TASKS)]
    for number in range(len(blocks)):  # all tasks of a block run at the same merge
        assert len({arrivals for own_number, arrivals in forwards if own_number == number}) == 1
    seen.clear()
    torch.stack(own).sum().backward()
    assert [number for number, _ in seen] == [n for n in reversed(range(len(blocks))) for _ in range(TASKS)]


@pytest.mark.parametrize(
    "name", ["Gemma 3n", "Mixtral", "Mamba", "T5", "Wav2Vec2", "Swin", "CLIP", "Qwen2-VL"]
)
def test_families_that_take_turns_compute_the_same(name: str) -> None:
    """No state of one forward is seen by another one's: adapters' taps and recomputed blocks too."""
    family = FAMILIES[name]
    module = family.build()
    vectors = task_vectors(module, FORMS["mixed"])
    recompute_blocks(module)
    plain = name in ("Mixtral", "Mamba", "T5")  # whose ids may stand anywhere

    def varied(task: int) -> dict[str, Tensor]:
        given = dict(family.inputs())
        if plain:
            given["input_ids"] = given["input_ids"].roll(task, -1)
        return {n: v * (1 + 0.1 * task) if v.is_floating_point() else v for n, v in given.items()}

    inputs = [varied(task) for task in range(TASKS)]
    found = []
    for link in (None, CountedLink()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merged_weights, "link_to", lambda _, link=link: link)
            own = copy.deepcopy(module)
            recompute_blocks(own)
            coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes), 0.3)
            merged = MergedModel(own, vectors, coefficients)
        with merged.tapped():
            runs = merged.run(
                [lambda own=own, given=given: loss(own(**given)) for given in inputs], merge=True
            )
            torch.stack(runs).sum().backward()
        found.append((torch.stack(runs).detach(), merged.gradient()))
    assert_same_bits(found[0][0], found[1][0])
    assert relative_error(found[1][1], found[0][1]) < LIMIT
