"""A file is at any moment the old or the new one, and what killed writers left is removed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainmerge.system.atomic import append_line, rename_whole, replacing, sweep, write_whole
from trainmerge.system.disk_space import naming
from trainmerge.system.staging import staging
from trainmerge.system.temporary_names import aside


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_old_file_stays_until_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "deep" / "a.json", []
    forced = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        forced(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(file, "old")
    with replacing(file) as new:
        new.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [name.startswith(".a.json.new-") for name in seen] == [
        True,
        False,
    ] * 2  # the file, then its folder
    assert seen[1] == "deep"
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_a_folder_is_renamed_when_all_of_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target, seen = tmp_path / "made", tmp_path / "step-1", []
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "b").write_text("b")
    forced = os.fsync

    def watched(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, target.exists()))
        forced(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    rename_whole(folder, target)
    assert seen == [("inner", False), ("b", False), ("made", False), (tmp_path.name, True)]
    assert (target / "inner" / "b").read_text() == "b"
    folder.mkdir()
    with pytest.raises(OSError, match="not empty"):
        rename_whole(folder, target)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(FileNotFoundError, match="absent"), replacing(file) as new:
        new.write_text((tmp_path / "absent").read_text())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_full_disk_names_the_file_and_not_its_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with pytest.raises(OSError, match=r"free some space, or write elsewhere: .*/a'$"), replacing(file) as new:
        raise OSError(errno.ENOSPC, "No space left on device", str(new))
    with pytest.raises(FileNotFoundError, match="other"), naming(file):
        (tmp_path / "other").read_text()


def test_only_what_dead_writers_of_this_machine_left_is_swept(tmp_path: Path) -> None:
    host, process = os.uname().nodename, dead()
    gone = [f".a.json.new-{host}-{process}-1f", f"..a.new-{host}-{process}-1f.new-{host}-{process}-2f"]
    stay = [
        f".a.json.new-{host}-{os.getpid()}-1f", f".a.json.new-elsewhere-{process}-1f", "a.new-thing",
        f".a.json.tmp-{host}-{process}-1f", ".lock", aside(tmp_path / "b", "new").name,
    ]  # fmt: skip
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert {path.name for path in tmp_path.iterdir()} == set(stay)


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    append_line(tmp_path / "a", "one")
    append_line(tmp_path / "a", "zwei ü", durable=True)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "one\nzwei ü\n"


def test_a_full_disk_names_the_file_in_the_folder_to_be(tmp_path: Path) -> None:
    def fill(*names: str) -> None:
        with staging(tmp_path / "out") as new:
            raise OSError(errno.ENOSPC, "No space left on device", *(str(new / name) for name in names))

    for names, named in (([], "out/'"), (["a"], "out/a'")):
        with pytest.raises(OSError, match=rf"free some space, or write elsewhere: '.*/{named}$"):
            fill(*names)
    assert list(tmp_path.iterdir()) == []
