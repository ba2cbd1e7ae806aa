"""`make bench`: every group can be imported, so that none is lost to a renamed function."""

import importlib
import json
from pathlib import Path

import pytest

from tests.bench.__main__ import GROUPS
from tests.results import FOLDER

KEPT = sorted((FOLDER / "bench").glob("*.json"))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_a_module(group: str) -> None:
    assert callable(importlib.import_module(f"tests.bench.{group}").main)


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_kept_figures_are_of_a_group_and_have_words(kept: Path) -> None:
    content = json.loads(kept.read_text())
    assert content["group"] == kept.stem
    assert kept.stem in GROUPS
    assert all(row["what"] and {"name", "value", "unit", "bar"} <= row.keys() for row in content["figures"])
