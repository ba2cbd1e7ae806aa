"""A finished run, which tests copy before they change it."""

from pathlib import Path

import pytest

from tests.fitting.test_fit import fit_world
from tests.world import write_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    fit_world(root, root / "run", steps=2)
    return root / "run"
