"""The tables of README and the documentation are those of `tests/results`."""

import json
from html import unescape

import pytest

from tests import doc_pictures, held_out_scores, results
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


@pytest.mark.parametrize("name", sorted(doc_pictures.SOURCES))
def test_pictures_show_what_the_results_give(name):
    """A picture's file holds what it was drawn from, and a page shows it."""
    drawn = (doc_pictures.FOLDER / f"{name}.svg").read_text()
    held = unescape(drawn.partition("<dc:description>")[2].partition("</dc:description>")[0])
    assert held == doc_pictures.SOURCES[name](), "run .venv/bin/python -m tests.doc_pictures"
    assert any(f"pictures/{name}.svg)" in page.read_text() for page in PAGES)


def test_a_suite_with_both_files_is_drawn_and_listed(tmp_path, monkeypatch):
    (tmp_path / "bench").symlink_to((results.FOLDER / "bench").absolute())
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    rows = {"a": {"mean": 0.2}, "b": {"mean": 0.6}, "c": {"mean": 0.4}}
    results.keep("lm-auto/held-out", "f", rows)
    assert [suite.title for suite in held_out_scores.suites()] == [held_out_scores.DEMO]
    scores = {"a": 40.0, "b": 30.0, "c": 35.0}
    results.keep("lm-auto/labelled", "f", {"metric": "perplexity", "scores": scores})
    found = held_out_scores.suites()[1]
    assert found.correlation == pytest.approx(1.0)  # the lowest perplexity recovers most
    assert "| three language models: perplexity, Spearman 1.00 | b | 0.600 | 30 |" in held_out_scores.table()
    titles = [axes.get_title() for axes in doc_pictures.recovered().axes]
    assert titles[1] == "three language models: Spearman 1.00"
