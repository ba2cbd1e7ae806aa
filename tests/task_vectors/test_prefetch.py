"""Task vectors that are sent ahead of their use: the same bits, each pass once, a bounded buffer."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.contracts import assert_same_bits
from tests.stand_in import CountedLink, behind
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched
from trainmerge.model import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.pass_order import successors
from trainmerge.model.residency import Residency, Share, reside
from trainmerge.task_vectors import prefetch
from trainmerge.task_vectors.link import copied, link_to
from trainmerge.task_vectors.prefetch import Mapped, Prefetch
from trainmerge.task_vectors.slabs import Slabs

FORMS = [Difference, ExpertWeight, LowRank, Untouched]


def walk(prefetch: Prefetch, deltas, names: str) -> None:
    after = successors(names)
    for name in names:
        got = prefetch.take(name, after)
        assert_same_bits(got.dense(), deltas[name].dense())
        assert got.base.data_ptr() != deltas[name].base.data_ptr()


def test_a_turn_finds_what_the_pass_before_used_last(random_delta) -> None:
    deltas = {name: random_delta((8, 3), FORMS) for name in "abcdef"}
    link, one = CountedLink(), deltas["a"].nbytes
    prefetch = Prefetch(deltas, link)
    walk(prefetch, deltas, "abcdef")
    assert link.bytes == 6 * one
    walk(prefetch, deltas, "fedcba")
    assert link.bytes == 10 * one  # e and f were there
    walk(prefetch, deltas, "abcdef")
    assert link.bytes == 14 * one
    walk(prefetch, deltas, "abcdef")  # not turned: nothing of use is left
    assert link.bytes == 20 * one
    assert link.arrivals == 24
    assert link.highest <= 3 * one  # two, and one that a reader still has
    assert all(name.startswith("stand-in") for name in link.threads)


def test_wrong_guesses_cost_a_copy_and_never_a_wrong_delta(random_delta) -> None:
    deltas = {name: random_delta((rows, 3), FORMS) for name, rows in zip("abcd", (5, 9, 1, 7), strict=True)}
    prefetch = Prefetch(deltas, CountedLink())
    for name in "abdcabcd":
        got = prefetch.take(name, {"a": "c", "c": "a", "b": "b", "d": "a"})
        assert_same_bits(got.dense(), deltas[name].dense())


def test_what_stays_is_sent_once_and_what_is_held_is_held_once(random_delta) -> None:
    deltas = {name: random_delta((8, 3), FORMS) for name in "abcdef"}
    link, one = CountedLink(), deltas["a"].nbytes
    prefetch = Prefetch(deltas, link, on_device="ace", in_host="bd")
    for _ in range(2):
        walk(prefetch, deltas, "abcdef")
        walk(prefetch, deltas, "fedcba")
    counts = {name: link.sends[delta.base.data_ptr()] for name, delta in deltas.items()}
    assert [counts[name] for name in "ace"] == [1, 1, 1]
    assert [counts[name] for name in "bdf"] == [3, 1, 2]  # d is in the buffer at every turn
    assert link.alive <= 3 * one + 2 * one


@pytest.mark.parametrize("rows", [(slice(None)), slice(1, None), slice(3, 5)])
def test_a_copy_begins_as_its_source_does(random_delta, rows) -> None:
    delta = random_delta((7, 3), [*FORMS], dtype=torch.bfloat16).rows(rows)
    twin = copied(delta)
    assert_same_bits(twin.dense(), delta.dense())
    assert twin.base.data_ptr() != delta.base.data_ptr()
    assert (twin.base.data_ptr() - delta.base.data_ptr()) % 64 == 0


def shapes_of(layers: int, width: int, middle: int, vocabulary: int) -> list[tuple[int, ...]]:
    """A language model's parameters."""
    layer = [(width, width)] * 4 + [(middle, width)] * 2 + [(width, middle), (width,), (width,)]
    return [(vocabulary, width), *layers * layer, (width,), (vocabulary, width)]


@pytest.mark.parametrize("sizes", [(32, 64, 172, 500), (21, 80, 216, 2000), (80, 32, 112, 128)])
def test_few_large_buffers_take_what_their_tensors_have(sizes: tuple[int, int, int, int]) -> None:
    """As pinned memory is rounded: within 5% of the plan, base and three experts."""
    tensors = [torch.rand(shape) for shape in shapes_of(*sizes) for _ in range(4)]
    whole, taken = sum(tensor.nbytes for tensor in tensors), []

    def allocate(size: int) -> torch.Tensor:
        taken.append(1 << (size - 1).bit_length())
        return torch.empty(size, dtype=torch.uint8)

    slabs = Slabs(whole, allocate)
    copies = [slabs.copy(tensor) for tensor in tensors]
    assert sum(taken) == pytest.approx(whole, rel=0.05)
    assert len(taken) < 12
    for copy, tensor in zip(copies, tensors, strict=True):
        assert_same_bits(copy, tensor)
    turned = Slabs(10, allocate).copy(tensors[0].T)  # too large for what was said
    assert turned.stride() == tensors[0].T.stride()
    assert_same_bits(turned, tensors[0].T)


def test_held_copies_are_read_in_place_of_the_files(random_delta) -> None:
    deltas = {"a": random_delta((4, 3), FORMS), "b": random_delta((5, 3), FORMS)}
    want = deltas["a"].dense()
    supply = Mapped(deltas, held="a")
    assert supply.take("b", {}) is deltas["b"]
    first = supply.take("a", {})
    deltas["a"].base.zero_()
    assert supply.take("a", {}) is first
    assert_same_bits(first.dense(), want)


PLACES = ("device", "host", "file", "device for half")


def places_of(where: str, vectors) -> Residency:
    shares = {name: Share(delta.nbytes) for name, delta in vectors.deltas.items()}
    if where != "device for half":
        return reside(where, shares)
    return Residency(dict.fromkeys([*shares][::2], "device"))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("behind_a_link", [False, True])
def test_a_merged_model_gives_the_same_bits(
    where, keep, behind_a_link, tiny_llama, random_task_vectors, monkeypatch
) -> None:
    ids = torch.randint(29, (2, 7), generator=torch.Generator().manual_seed(1))
    vectors = random_task_vectors(tiny_llama, FORMS)
    coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes), 0.3)

    def step(merged: MergedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
        merged.materialise()
        for _ in range(2):
            logits = merged.module(ids).logits
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return merged.gradient(), [p.detach().clone() for p in merged.module.parameters()]

    merged = MergedModel(tiny_llama, vectors, coefficients, keep_gradients=keep)
    want, weights = step(merged)
    if behind_a_link:
        monkeypatch.setattr(merged_weights, "link_to", behind(CountedLink()))
    merged = merged.with_task_vectors(vectors, {}, keep, places_of(where, vectors))
    for _ in range(2):
        gradient, parameters = step(merged)
        assert_same_bits(gradient, want)
        for got, expected in zip(parameters, weights, strict=True):
            assert_same_bits(got, expected)
    with merged.teacher(0):
        assert_same_bits(
            merged.parameters["model.norm.weight"],
            vectors.deltas["model.norm.weight"].base + vectors.deltas["model.norm.weight"].terms[0].tau,
        )


def test_on_a_processor_nothing_is_sent() -> None:
    assert link_to(torch.device("cpu")) is None


def test_files_larger_than_memory_are_read_ahead_in_the_order_of_use(random_delta, monkeypatch) -> None:
    deltas = {f"layers.{i}.weight": random_delta((8, 3), FORMS) for i in range(4)}
    asked: list[int] = []
    monkeypatch.setattr(prefetch, "read_ahead", lambda part: asked.append(part.data_ptr()))
    bases = [delta.base.data_ptr() for delta in deltas.values()]
    for room, want in ((1 << 40, []), (None, []), (100, bases[1:] + bases[-2::-1])):
        monkeypatch.setattr(prefetch, "available", lambda room=room: room)
        mapped = Mapped(deltas)
        for order in ([*deltas], [*reversed(deltas)]):
            after = successors(order)
            for name in order:
                assert mapped.take(name, after) is deltas[name]
        assert [address for address in asked if address in bases] == want
