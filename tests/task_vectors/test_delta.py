"""Dense forms, shapes and replacement of task vectors; the passes themselves are in test_kernels.py."""

import pytest
import torch

from tests.bounds import assert_within, sum_bound
from tests.contracts import assert_same_bits, magnitude, tensors_of, true_tau
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched, accumulation_dtype
from trainmerge.task_vectors.delta import TaskVectors, dense_term

FORMS = [Difference, ExpertWeight, LowRank, Untouched]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [[], [7], [5, 3], [6, 4, 5]], ids=str)
def test_dense(random_delta, shape, dtype):
    delta = random_delta(shape, FORMS, dtype)
    before = [part.clone() for part in tensors_of(delta)]
    dense = delta.dense()
    assert dense.shape == (4, *shape)
    assert dense.dtype == accumulation_dtype(dtype)
    for tau, term in zip(dense, delta.terms, strict=True):
        ranks = term.up.shape[1] if isinstance(term, LowRank) else 1
        bound = sum_bound(magnitude(term, delta.base), ranks, accumulation_dtype(dtype))
        assert_within(tau, true_tau(term, delta.base), bound)
        assert_same_bits(dense_term(term, delta.base), tau)
    dense.fill_(7)  # the caller's own copy
    for part, copy in zip(tensors_of(delta), before, strict=True):
        assert_same_bits(part, copy)


def test_shapes_keep_the_order_of_the_base(tiny_llama, random_task_vectors):
    task_vectors = random_task_vectors(tiny_llama, FORMS)
    want = {name: parameter.shape for name, parameter in tiny_llama.named_parameters()}
    assert list(task_vectors.shapes.items()) == list(want.items())


def test_replaced(tiny_mlp, random_task_vectors):
    task_vectors = random_task_vectors(tiny_mlp, FORMS)
    taus = {name: [2 * tau for tau in delta.dense()] for name, delta in task_vectors.deltas.items()}
    replaced = task_vectors.replaced(taus)
    assert isinstance(replaced, TaskVectors)
    assert replaced.experts == task_vectors.experts
    assert list(replaced.deltas) == list(task_vectors.deltas)
    for name, delta in replaced.deltas.items():
        assert delta.base is task_vectors.deltas[name].base
        assert all(isinstance(term, Difference) for term in delta.terms)
        assert_same_bits(delta.dense(), 2 * task_vectors.deltas[name].dense())
    assert any(isinstance(t, LowRank) for d in task_vectors.deltas.values() for t in d.terms)  # untouched
