"""The runner of small inputs names modules that exist, and tells answers apart."""

import importlib

import pytest

from tests.cases import MODULES, MOVED, mended, verdict


@pytest.mark.parametrize(("name", "module"), MOVED.items())
def test_a_moved_name_is_where_the_table_says(name: str, module: str) -> None:
    was = {"Economy": "StepSchedule", "combined": "aggregate_gradients"}
    assert hasattr(importlib.import_module(f"trainmerge.{module}"), was.get(name, name))


@pytest.mark.parametrize("module", MODULES.values())
def test_a_moved_module_exists(module: str) -> None:
    importlib.import_module(module)


def test_imports_of_an_old_script_are_mended() -> None:
    assert mended("from trainmerge.run import RunFolder") == "from trainmerge.run.folder import RunFolder"


def test_expectations_of_an_older_card_are_replaced() -> None:
    old = 'widths = {l.replace("\\\\|", "").count("|") for l in rows}'
    names: dict[str, object] = {"t": "| a | b |\n| c | d |\n\n| a |\n| b |\n", "rows": ["| a |"]}
    exec(mended(old), names)
    assert names["widths"] == {1}
    names["t"] = "| a | b |\n| c |\n"
    exec(mended(old), names)
    assert names["widths"] == {2}


def test_answers() -> None:
    assert verdict("PASS: early\nFAIL: late\n", "", 1) == "FAIL 1 of 2: late"
    assert verdict("FAIL: early\nPASS: late\n", "", 0) == "FAIL 1 of 2: early"
    assert verdict("some words\nPASS: late\n", "", 0) == "PASS: late"
    assert verdict("0.5\n", "", 0) == "0.5"
    assert verdict("begun\n", "Traceback\nValueError: no\nmore words\n", 1) == "refused: ValueError: no"
    assert verdict("", "Traceback\nKeyError: 'a'\n", 1) == "CRASH KeyError: 'a'"
