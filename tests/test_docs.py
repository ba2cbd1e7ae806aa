"""The documentation: it builds without a warning, and every method has its page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainmerge as tm
from trainmerge.coefficients.measured_presets import MeasuredPreset

DOCS = Path("notebooks/docs")
KINDS = (tm.Objective, tm.Preprocess, tm.Preset)
CONTRACTS = {*KINDS, tm.Informed, tm.Piecewise, MeasuredPreset}
METHODS = [
    cls
    for cls in (getattr(tm, name) for name in tm.__all__)
    if isinstance(cls, type) and issubclass(cls, KINDS) and cls not in CONTRACTS
]


def test_site_builds_without_a_warning(tmp_path):
    command = [
        "mkdocs",
        "build",
        "--quiet",
        "--config-file",
        "notebooks/mkdocs.yml",
        "--site-dir",
        str(tmp_path),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, check=False
    )
    assert built.returncode == 0, built.stderr
    assert "<h1" in (tmp_path / "methods" / "ties" / "index.html").read_text()


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)
def test_every_method_has_a_page_with_its_reference(method):
    reference = f"::: {method.__module__}.{method.__name__}\n"
    assert any(reference in page.read_text() for page in (DOCS / "methods").glob("*.md"))


@pytest.mark.parametrize(
    "page",
    sorted({*(DOCS / "methods").glob("*.md")} - {DOCS / "methods" / "index.md"}),
    ids=lambda page: page.stem,
)
def test_every_page_says_when_it_helps_what_it_costs_and_where_it_is_from(page):
    text = page.read_text()
    for heading in ("## When it helps", "## Cost", "## Source", "## Reference"):
        assert text.count(heading) == 1


def test_every_public_name_is_in_the_documentation():
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    modules = {line.removeprefix("::: ") for line in text.splitlines() if line.startswith("::: ")}
    missing = [
        name
        for name in tm.__all__
        if not {f"{getattr(tm, name).__module__}.{name}", getattr(tm, name).__module__} & modules
    ]
    assert missing == []


def test_readme_names_every_method_and_stays_short():
    text = Path("README.md").read_text()
    pages = [page for page in sorted((DOCS / "methods").glob("*.md")) if page.name != "index.md"]
    assert [page.name for page in pages if f"({page})" not in text] == []
    assert len(text.splitlines()) <= 220
