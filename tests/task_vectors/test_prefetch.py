"""Task vectors that arrive one parameter ahead: the same bits, and the order learned from a pass."""

import threading

import torch
from torch.nn.functional import cross_entropy

from tests.contracts import assert_same_bits
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.prefetch import Prefetch, each_tensor, prefetch_to

FORMS = [Difference, ExpertWeight, LowRank, Untouched]


class Courier:
    """Copies a delta, as to a device, and keeps a record of when and in which thread."""

    def __init__(self) -> None:
        self.moved: list[torch.Size] = []
        self.threads: set[str] = set()

    def __call__(self, delta: Delta) -> Delta:
        self.moved.append(delta.shape)
        self.threads.add(threading.current_thread().name)
        return each_tensor(delta, torch.clone)


def test_what_is_next_is_learned_from_the_pass_before(random_delta) -> None:
    deltas = {str(rows): random_delta((rows, 3), FORMS) for rows in (4, 5, 6)}
    courier, arrived = Courier(), []
    prefetch = Prefetch(courier, lambda delta: arrived.append(delta.shape))

    def walk(names: str) -> None:
        for name in names:
            got = prefetch.take(deltas, name)
            assert_same_bits(got.dense(), deltas[name].dense())
            assert got.base.data_ptr() != deltas[name].base.data_ptr()

    walk("456")
    assert len(courier.moved) == 3  # nothing was known of the order
    walk("456")
    walk("456")
    # each pass moved its own three, none twice; one more may be on its way to a pass that may come
    assert [shape[0] for shape in courier.moved[:9]] == [4, 5, 6] * 3
    walk("654")  # the other way round: wrong guesses cost a copy, never a wrong delta
    assert len(arrived) == 12
    assert all(name.startswith("prefetch") for name in courier.threads)
    other = {name: random_delta(delta.shape, FORMS) for name, delta in deltas.items()}
    assert_same_bits(prefetch.take(other, "5").dense(), other["5"].dense())


def test_a_merged_model_gives_the_same_bits(tiny_llama, random_task_vectors) -> None:
    ids = torch.randint(29, (2, 7), generator=torch.Generator().manual_seed(1))
    vectors = random_task_vectors(tiny_llama, FORMS)
    coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes), 0.3)

    def step(merged: MergedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
        merged.materialise()
        logits = merged.module(ids).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return merged.gradient(), [p.detach().clone() for p in merged.module.parameters()]

    merged = MergedModel(tiny_llama, vectors, coefficients)
    want, weights = step(merged)
    courier = Courier()
    merged._to_write, merged._to_collect = Prefetch(courier), Prefetch(courier)
    for _ in range(2):
        gradient, parameters = step(merged)
        assert_same_bits(gradient, want)
        for got, expected in zip(parameters, weights, strict=True):
            assert_same_bits(got, expected)
    assert len(courier.moved) >= 4 * len(vectors.deltas)
    with merged.teacher(0):
        assert_same_bits(
            merged.parameters["model.norm.weight"],
            vectors.deltas["model.norm.weight"].base + vectors.deltas["model.norm.weight"].terms[0].tau,
        )


def test_on_a_processor_nothing_is_copied() -> None:
    assert prefetch_to(torch.device("cpu")) is None
