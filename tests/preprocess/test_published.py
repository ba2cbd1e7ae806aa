"""How far each method is from its authors' code: the figures that the page of methods quotes."""

import re
from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.methods import matrices, one, run, vectors
from tests.preprocess.published import figures, widen

PAGE = (Path(__file__).parents[2] / "notebooks/docs/methods/index.md").read_text()
EQUAL = ("doge, adam", "tsv", "opcm")
ARBITRARY = ("doge, low-rank", "doge, adam, low-rank", "tsv, low-rank", "opcm, low-rank")


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return figures()


def test_the_same_where_the_formula_is_the_same(measured: dict[str, float]) -> None:
    assert {name: measured[name] < 1e-9 for name in EQUAL} == dict.fromkeys(EQUAL, True)


def test_the_page_quotes_what_is_measured(measured: dict[str, float]) -> None:
    """References on arbitrary directions depend on the library for linear algebra, so only roughly."""
    quoted = dict(re.findall(r"<!-- ([a-z0-9, -]+) -->([0-9.]+)", PAGE))
    assert quoted.keys() == measured.keys() - set(EQUAL)
    for name, figure in quoted.items():
        assert measured[name] == pytest.approx(float(figure), rel=0.5 if name in ARBITRARY else 0.06)


def test_optmerge_stops_where_the_published_runs_do() -> None:
    taus = matrices(0, 1)
    assert torch.equal(one(tm.OptMerge(), *taus), one(tm.OptMerge(300.0), *taus))
    assert torch.equal(one(tm.OptMerge(start="mean"), *taus), one(tm.OptMerge(0.6, "mean"), *taus))


def test_widen_is_the_published_code() -> None:
    taus = {"w": torch.stack(matrices(0, 1, 2)), "norm": 0.01 * matrices(5, shape=(3, 8))[0]}
    given = vectors(taus)
    for name, result in run(tm.Widen(), taus).items():
        want = widen(given.deltas[name].base, taus[name])
        torch.testing.assert_close(result.sum(0), want)
