"""`import trainmerge as tm`: one list of names, `__init__.pyi`, imported when first used."""

import subprocess
import sys
from pathlib import Path

import pytest

import trainmerge as tm

AUTHORS = {
    "Asks",
    "Batch",
    "Constraint",
    "Delta",
    "Head",
    "Informed",
    "Objective",
    "Outputs",
    "Piecewise",
    "Preprocess",
    "Preset",
    "Quantise",
}  # fmt: skip - the types that plug-ins are written with


def test_every_name_is_there_and_no_other() -> None:
    assert set(tm.__all__) == set(dir(tm)) > AUTHORS
    assert all(getattr(tm, name).__name__ == name for name in tm.__all__)
    with pytest.raises(AttributeError, match=r"trainmerge.* attribute .*Tise"):
        tm.Tise  # noqa: B018


def test_the_list_has_no_name_twice() -> None:
    lines = Path(tm.__file__).with_suffix(".pyi").read_text().splitlines()
    listed = [line.split()[-1] for line in lines if line.startswith("from ")]
    assert sorted(listed) == list(tm.__all__)


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, trainmerge; sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
