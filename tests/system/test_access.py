"""Places that cannot be read or written are named before work, and a folder that can only be read is read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.powerless import entered, error_of  # noqa: F401 - a fixture
from trainmerge.run.folder import RunFolder
from trainmerge.system.access import check_file_place, check_folder_place, is_folder
from trainmerge.system.atomic import write_whole
from trainmerge.system.hub import folder_of
from trainmerge.system.safetensors_file import MappedFile
from trainmerge.system.staging import staging
from trainmerge.system.text import words_of
from trainmerge.system.torch_file import load_torch
from trainmerge.system.workspace import cached


def _stage(path: Path) -> None:
    with staging(path):
        pass


OUTPUTS = [_stage, check_folder_place, check_file_place, lambda path: RunFolder(path).check_place()]


@pytest.mark.parametrize("ask", OUTPUTS)
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_forbids_writing_is_named(
    entered: Path,  # noqa: F811
    ask: Callable[[Path], object],
    mode: int,
) -> None:
    locked = entered / "locked"
    locked.mkdir(mode=mode)
    wanted = f"ValueError: {locked}: no permission to write there: choose another folder, or change that"
    assert error_of(lambda: ask(locked / "new" / "out")) == wanted


@pytest.mark.parametrize("ask", OUTPUTS)
def test_a_parent_that_is_a_file_is_named(tmp_path: Path, ask: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is not a folder, so .* cannot be"):
        ask(tmp_path / "file" / "new" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: name a file to write"):
        check_file_place(tmp_path)
    check_file_place(tmp_path / "new" / "file.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.safetensors", lambda path: MappedFile(path).read("a")),
        ("a.bin", load_torch),
        ("", lambda path: folder_of(str(path))),
    ],
)
def test_what_must_not_be_read_is_named_and_not_called_damaged(
    entered: Path,  # noqa: F811
    name: str,
    read: Callable[[Path], object],
) -> None:
    folder = entered / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "a.safetensors")
    torch.save({"a": torch.ones(2)}, folder / "a.bin")
    for file in (*folder.iterdir(), folder):
        file.chmod(0o555)
    assert error_of(lambda: read(folder / name)) == "none"  # reading needs no more
    (folder / name).chmod(0)
    assert error_of(lambda: read(folder / name)).startswith(
        f"ValueError: {folder / name}: no permission to read it: "
    )


def test_a_workspace_that_forbids_writing_is_named_before_work(entered: Path) -> None:  # noqa: F811
    """The run folder itself may be written; what is cached already is read."""
    run = RunFolder(entered / "run")
    run.workspace.mkdir(parents=True)
    run.path.chmod(0o777)
    save_file({"a": torch.ones(2)}, run.workspace / "made.safetensors")
    (run.workspace / "made.safetensors").chmod(0o644)
    run.workspace.chmod(0o555)

    def work(_: Path) -> None:
        raise AssertionError("work")

    wanted = (
        f"ValueError: {run.workspace}: no permission to write there: choose another folder, or change that"
    )
    assert error_of(lambda: cached(run.workspace / "made.safetensors", work)) == "none"
    assert error_of(lambda: cached(run.workspace / "new.safetensors", work)) == wanted
    assert error_of(lambda: write_whole(run.workspace / "new.json", "{}")) == wanted
    assert error_of(run.check_place) == wanted


def test_a_name_that_no_file_can_have_is_no_folder(tmp_path: Path) -> None:
    assert [is_folder(tmp_path / name) for name in ("x" * 300, "x\x00", "x", ".")] == [
        False,
        False,
        False,
        True,
    ]


def test_the_systems_errors_name_the_file_first() -> None:
    assert words_of(OSError(28, "No space left on device", "/x/y")) == "/x/y: No space left on device"
    assert words_of(OSError("/x: 5 bytes are needed")) == "/x: 5 bytes are needed"
