"""Controls: norms and ranks of random task vectors, the weights of each control, and that nothing stays."""

import torch
from torch import Tensor

from tests.bounds import assert_within
from tests.contracts import assert_same_bits
from tests.world import bert, nudge
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched
from trainmerge.model.controls import random_term, random_vectors, shuffled
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import TaskVectors, dense_term

EPS = torch.finfo(torch.float32).eps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_random_term_has_norm_and_rank() -> None:
    base = torch.randn(12, 8, generator=generator(1))
    terms = [
        Difference(torch.randn(12, 8, generator=generator(2))),
        ExpertWeight(base + 0.1 * torch.randn(12, 8, generator=generator(3))),
        LowRank(torch.randn(12, 2, generator=generator(4)), torch.randn(2, 8, generator=generator(5)), -0.7),
    ]
    for term in terms:
        old, new = dense_term(term, base), dense_term(random_term(term, base, generator()), base)
        assert_within(new.norm(), old.double().norm(), base.numel() * EPS * float(old.norm()))
        assert torch.linalg.matrix_rank(new) == torch.linalg.matrix_rank(old)
        assert abs(torch.cosine_similarity(new.flatten(), old.flatten(), dim=0)) < 0.4
    assert isinstance(random_term(Untouched(), base, generator()), Untouched)


def world() -> MergedModel:
    base, experts = bert(), [bert() for _ in range(3)]
    for k, expert in enumerate(experts):
        nudge(expert, k)
    states = {f"e{k}": expert.state_dict() for k, expert in enumerate(experts)}
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    vectors = TaskVectors.from_state_dicts(start, states)
    layout = Grouping(granularity="tensor").layout(vectors.shapes)
    coefficients = Coefficients(vectors.experts, layout, 0.3)
    coefficients.reset_(torch.rand(coefficients.raw.shape, generator=generator(9)))
    merged = MergedModel(base, vectors, coefficients)
    merged.materialise()
    return merged


def weights(merged: MergedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in merged.module.named_parameters()}


def test_controls_are_in_the_module_and_leave_it() -> None:
    merged = world()
    before, values = weights(merged), merged.coefficients().detach()
    with shuffled(merged):
        inside = weights(merged)
    with random_vectors(merged, seed=1):
        drawn = weights(merged)
    with random_vectors(merged, seed=1):
        again = weights(merged)
    with random_vectors(merged, seed=2):
        other = weights(merged)
    for name, delta in merged.task_vectors.deltas.items():
        group = merged.coefficients.layout.groups[name][0]
        taus, c = delta.dense().double(), values[:, group].double()
        want = delta.base.double() + torch.einsum("k,k...->...", c[[1, 2, 0]], taus)
        size = delta.base.double().abs() + torch.einsum("k,k...->...", c[[1, 2, 0]].abs(), taus.abs())
        assert_within(inside[name], want, 8 * EPS * size)
        assert_same_bits(again[name], drawn[name])
        assert not torch.equal(other[name], drawn[name])
    for name, weight in weights(merged).items():
        assert_same_bits(weight, before[name])
