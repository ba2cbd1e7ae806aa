"""A new adapter by hooks: it is W + up @ down, it is the base at first, and nothing of it stays."""

import torch
from torch import Tensor

from tests.bounds import assert_within
from tests.contracts import assert_same_bits
from tests.model.test_controls import weights
from tests.world import bert, nudge
from trainmerge.checkpoints.roles import roles_of
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.model.adapted import LowRankChange, adapted, new_changes
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import TaskVectors

EPS = torch.finfo(torch.float32).eps
IDS = torch.tensor([[2, 5, 7, 3]])


def world() -> MergedModel:
    base, experts = bert().eval(), [bert() for _ in range(3)]
    for k, expert in enumerate(experts):
        nudge(expert, k)
    states = {f"e{k}": expert.state_dict() for k, expert in enumerate(experts)}
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    vectors = TaskVectors.from_state_dicts(start, states, roles=roles_of(base))
    layout = Grouping(granularity="tensor").layout(vectors.shapes)
    merged = MergedModel(base, vectors, Coefficients(vectors.experts, layout, 0.3))
    merged.materialise()
    return merged


def outputs(merged: MergedModel) -> Tensor:
    states: Tensor = merged.module(input_ids=IDS).last_hidden_state
    return states


def test_new_changes_are_none() -> None:
    merged = world()
    with merged.uniform(torch.zeros(3)):
        want = outputs(merged)
    with adapted(merged, new_changes(merged, rank=2, seed=1)):
        assert torch.equal(outputs(merged), want)


def test_a_change_is_its_products_and_leaves_the_model() -> None:
    """Layer by layer in float64, at inputs that the layer gets inside the model."""
    merged, generator = world(), torch.Generator().manual_seed(3)
    before, learned = weights(merged), [p for p in merged.module.parameters() if p.requires_grad]
    drawn = {
        name: LowRankChange(own.down, torch.randn(own.up.shape, generator=generator).requires_grad_())
        for name, own in new_changes(merged, rank=2, seed=1).items()
    }
    name = next(name for name in drawn if "attention" in name)
    layer = merged.module.get_submodule(name.removesuffix(".weight"))
    seen: list[tuple[Tensor, Tensor]] = []
    with adapted(merged, drawn):
        handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        outputs(merged).square().sum().backward()
        handle.remove()
        assert not any(parameter.requires_grad for parameter in merged.module.parameters())
    ((x, y),) = seen
    base = merged.task_vectors.deltas[name].base.double()
    down, up = drawn[name].down.detach().double(), drawn[name].up.detach().double()
    plain = merged.task_vectors.deltas[name.replace("weight", "bias")].base.double()
    want = x.double() @ (base + up @ down).T + plain
    size = x.double().abs() @ (base.abs() + up.abs() @ down.abs()).T + plain.abs()
    assert_within(y, want, 2 * base.shape[1] * EPS * size)
    assert drawn[name].up.grad is not None
    assert drawn[name].down.grad is not None
    assert all(parameter.requires_grad for parameter in learned)
    for key, weight in weights(merged).items():
        assert_same_bits(weight, before[key])
