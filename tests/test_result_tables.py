"""The tables of README and the documentation are those of `tests/results`."""

import json

import pytest

from tests import results
from tests.result_tables import PAGES, TABLES, filled


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_have_what_the_results_give(page):
    text = page.read_text()
    assert filled(text) == text, "run .venv/bin/python -m tests.result_tables"


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert [
        name for name in TABLES if f"<!-- {name} -->" not in text or f"<!-- /{name} -->" not in text
    ] == []


@pytest.mark.parametrize(
    "file", sorted((results.FOLDER / "bench").glob("*.json")), ids=lambda file: file.stem
)
def test_every_figure_has_a_command_and_a_machine(file):
    content = json.loads(file.read_text())
    assert content["command"].endswith(f"ONLY={file.stem}")
    assert content["machine"]
    assert content["versions"]
    for figure in content["figures"]:
        assert set(figure) == {"name", "value", "unit", "bar", "what"}
