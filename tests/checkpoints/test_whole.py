"""An export that is seen before it is complete is refused; others are not looked at."""

import json
from pathlib import Path

import pytest

from trainmerge.checkpoints.whole import MANIFEST, RECIPE, check_whole


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    (tmp_path / RECIPE).touch()
    (tmp_path / MANIFEST).write_text(json.dumps({"bytes": {"model.safetensors": 10}}))
    return tmp_path


def test_a_whole_export_and_other_folders_pass(export: Path, tmp_path: Path) -> None:
    check_whole(export)
    (export / MANIFEST).write_text("{}")  # of an older version
    check_whole(export)
    check_whole(tmp_path / "absent")


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_weight_file_of_another_size_is_named(export: Path, size: int) -> None:
    (export / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(
        ValueError, match=rf"not whole: model\.safetensors has {size} of 10 bytes\. Export it"
    ):
        check_whole(export)


def test_a_missing_file_is_named(export: Path) -> None:
    (export / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors has 0 of 10 bytes"):
        check_whole(export)
    (export / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"{MANIFEST}, which is written last, is missing"):
        check_whole(export)
    (export / RECIPE).unlink()  # the error's own remedy
    check_whole(export)
