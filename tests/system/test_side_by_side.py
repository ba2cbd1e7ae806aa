"""Pieces of work side by side: their order, their threads, their modes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trainmerge.system.side_by_side import AHEAD, side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_are_in_order_and_those_of_one_thread() -> None:
    weight = torch.randn(65, 33)
    inputs = [torch.randn(7, 33) for _ in range(11)]

    def work(x: Tensor) -> tuple[int, Tensor]:
        return torch.get_num_threads(), x @ weight.T

    found = list(side_by_side(work, inputs))
    torch.set_num_threads(1)
    assert all(torch.equal(y, x @ weight.T) for x, (_, y) in zip(inputs, found, strict=True))
    assert {n for n, _ in found} == {1}


def test_threads_are_given_back_between_two_results(threads: int) -> None:
    results = side_by_side(lambda n: n, range(9))
    assert next(results) == 0
    assert torch.get_num_threads() == threads


def test_no_more_than_a_few_items_are_ahead(threads: int) -> None:
    taken: list[int] = []
    results = side_by_side(lambda n: n, (taken.append(n) or n for n in range(100)))  # type: ignore[func-returns-value]
    next(results)
    assert len(taken) <= AHEAD * threads


@pytest.mark.usefixtures("threads")
def test_work_has_the_modes_of_its_caller() -> None:
    def modes(_: int) -> tuple[bool, bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert set(side_by_side(modes, range(4))) == {(True, False, True)}
    with torch.no_grad():
        assert set(side_by_side(modes, range(4))) == {(False, False, False)}
    assert set(side_by_side(modes, range(4))) == {(False, True, False)}


def test_an_error_is_raised_and_the_threads_are_given_back(threads: int) -> None:
    def fail(n: int) -> int:
        if n == 1:
            raise ValueError("item 1")
        return n

    with pytest.raises(ValueError, match="item 1"):
        list(side_by_side(fail, range(8)))
    assert torch.get_num_threads() == threads
