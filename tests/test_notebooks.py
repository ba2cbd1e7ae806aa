"""The notebooks, run as they are; they are committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from trainmerge.system.threads import suggested

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    choice = suggested(os.environ)  # as the command line does
    environment = {**os.environ, **(choice.environment if choice else {})}
    here = {"metadata": {"path": "."}}
    NotebookClient(notebook, timeout=None, startup_timeout=1800, resources=here).execute(env=environment)
