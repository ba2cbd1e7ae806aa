"""Preprocessors in memory give the numbers of those in the workspace, bit for bit."""

from pathlib import Path

import pytest

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.methods import METHODS, count_for, random, vectors
from trainmerge.preprocess import Informed, apply, apply_in_memory

PLAIN = [name for name, method in METHODS.items() if not isinstance(method, Informed)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a method leaves out
@pytest.mark.parametrize("name", [*PLAIN, "two"])
def test_in_memory_is_as_in_files(name: str, tmp_path: Path) -> None:
    """Two elementwise methods: a matrix product of a mapped file may be rounded otherwise than in memory."""
    methods = [tm.Breadcrumbs(0.8, 0.05), tm.Ties(0.5)] if name == "two" else [METHODS[name]]
    given = vectors(random(count_for(name)))
    filed, held = apply(given, methods, tmp_path, "inputs"), apply_in_memory(given, methods)
    assert held.experts == filed.experts
    for parameter, delta in filed.deltas.items():
        for ours, theirs in zip(held.deltas[parameter].terms, delta.terms, strict=True):
            assert_same_bits(ours.tau, theirs.tau)


def test_methods_that_need_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Fisher, RegMean: needs .* transformers folders only"):
        apply_in_memory(vectors(random()), [tm.Fisher(), tm.Ties(), tm.RegMean()])


def test_no_method_changes_nothing() -> None:
    given = vectors(random())
    assert apply_in_memory(given, []) is given
