"""One process changes a run; it removes what killed ones left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use


def test_a_second_command_is_refused_and_others_of_the_same_fit_are_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    with in_use(folder, "trainmerge fit"):
        words = rf"runs/a is in use by trainmerge fit, process {os.getpid()} on "
        with pytest.raises(ValueError, match=words), in_use(folder, "trainmerge search"):
            pytest.fail("the body must not run")
        with in_use(folder, "trainmerge fit", first=False):
            pass
        folder.recipe.touch()
    assert [path.name for path in folder.path.iterdir()] == ["recipe.yaml"]


def test_a_folder_in_which_nothing_was_written_is_removed_again(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="a setting"),
        in_use(RunFolder(tmp_path / "b" / "a"), "trainmerge fit"),
    ):
        raise ValueError("a setting")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with in_use(RunFolder(tmp_path / "empty"), "trainmerge fit"):
        pass
    assert (tmp_path / "empty").is_dir()  # it was there before


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    folder.workspace.mkdir()
    own, other = f"{os.uname().nodename}-{dead.pid}-1f", "elsewhere-1-1f"
    for path in (
        tmp_path / f".manifest.json.new-{own}", folder.workspace / f".a.safetensors.new-{own}",
        folder.checkpoints / "step-3.saving", folder.checkpoints / f".step-4.ckpt.new-{own}",
        folder.checkpoints / f".step-4.ckpt.new-{other}",
    ):  # fmt: skip
        path.touch()
    for kind in ("new", "old"):
        (folder.workspace / f".adapter.{kind}-{own}").mkdir()
        (folder.workspace / f".adapter.{kind}-{own}" / "adapter_config.json").touch()
    kept = [
        folder.workspace / f".a.safetensors.new-{other}", folder.checkpoints / "step-2.ckpt",
        folder.workspace / f".adapter.old-{own}" / "adapter_config.json",  # maybe the only copy
    ]  # fmt: skip
    for path in kept:
        path.touch()
    with in_use(folder, "trainmerge fit"):
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([folder.lock, *kept])
