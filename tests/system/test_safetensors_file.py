"""Mapped reads, streamed writes, and folders that appear whole or not at all."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainmerge.system.disk_space import check_free_space
from trainmerge.system.safetensors_file import MappedFile, sha256, write_safetensors
from trainmerge.system.staging import staging

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float64]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"t{i}.{dtype}": torch.randint(0, 2, (3, i + 1), generator=generator).to(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    strided = torch.randn(4, 6, generator=generator).T
    single = torch.randn(8, generator=generator)[::8]  # contiguous to torch, with a stride of 8
    others = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "strided": strided, "single": single}
    return {**made, **others}


def specs(values: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in values.items()}


def test_written_files_are_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    values, file = tensors(), tmp_path / "a.safetensors"
    write_safetensors(file, specs(values), values.items(), {"format": "pt"})
    theirs, ours = load_file(file), MappedFile(file)
    assert ours.metadata == {"format": "pt"}
    assert theirs.keys() == ours.tensors.keys() == values.keys()
    for name, tensor in values.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours.read(name), tensor)
        assert ours.read(name).dtype == tensor.dtype
        assert ours.tensors[name].begin % tensor.element_size() == 0
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_the_same_input_gives_the_same_bytes_and_the_mode_follows_the_umask(tmp_path: Path) -> None:
    values = tensors()
    before = os.umask(0o022)
    try:
        for name in ("a", "b"):
            write_safetensors(tmp_path / name, specs(values), values.items())
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_writer_takes_tensors_in_any_order_and_in_pieces(tmp_path: Path) -> None:
    x, y, scalar = torch.randn(5, 3), torch.randn(4), torch.tensor(2.0)
    specs = {"x": (x.dtype, (5, 3)), "y": (y.dtype, (4,)), "s": (scalar.dtype, ())}
    pieces = [("y", y[:1]), ("x", x[:2]), ("s", scalar), ("y", y[1:]), ("x", x[2:])]
    write_safetensors(tmp_path / "pieces.safetensors", specs, pieces)
    write_safetensors(tmp_path / "whole.safetensors", specs, [("x", x), ("y", y), ("s", scalar)])
    assert (tmp_path / "pieces.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [("x", torch.zeros(3))],
            r"got x torch\.float32 \(3,\), the header has torch\.float32 \(2,\)",
        ),
        ([("x", torch.zeros(2).half())], r"torch\.float16 \(2,\), the header has torch\.float32"),
        ([("y", torch.zeros(2))], "in the header but not written: x"),
        ([("x", torch.zeros(2)), ("x", torch.zeros(1))], "of which 0 numbers are missing"),
        ([("x", torch.zeros(1)), ("y", torch.zeros(2))], "in the header but not written: x"),
        ([("x", torch.zeros(2))], "in the header but not written: y"),
        ([("x", torch.zeros(2)), ("y", torch.zeros(2)), ("z", torch.zeros(2))], "has no such tensor"),
    ],
)
def test_a_writer_that_breaks_its_promise_leaves_nothing(
    tmp_path: Path, given: list[tuple[str, torch.Tensor]], message: str
) -> None:
    promised = {"x": (torch.float32, (2,)), "y": (torch.float32, (2,))}
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "a.safetensors", promised, given)
    assert list(tmp_path.iterdir()) == []


def anonymous_memory() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_mapped_reads_and_streamed_writes_need_no_memory_of_their_own(tmp_path: Path) -> None:
    size = 1 << 20  # 4 MB each, 64 MB in all
    promised = {f"t{i}": (torch.float32, (size,)) for i in range(16)}
    source = torch.ones(size)
    source.sum()  # torch's threads start here
    before = anonymous_memory()
    write_safetensors(tmp_path / "a", promised, ((name, source) for name in promised))
    mapped = MappedFile(tmp_path / "a")
    read = [mapped.read(name) for name in promised]
    assert all(float(tensor.sum()) == size for tensor in read)
    assert anonymous_memory() - before < 16 << 20


def test_a_write_into_a_mapped_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(8)}, tmp_path / "a")
    MappedFile(tmp_path / "a").read("x").fill_(1.0)
    assert torch.equal(MappedFile(tmp_path / "a").read("x"), torch.zeros(8))


def test_an_unaligned_file_of_an_old_writer_is_read(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (5 - len(header) % 4)
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert (8 + len(header)) % 4
    assert MappedFile(tmp_path / "a").read("x").tolist() == [1.0, 2.0]


def file_of(entries: str, data: bytes) -> bytes:
    text = entries.encode()
    return len(text).to_bytes(8, "little") + text + data


X = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BROKEN = {
    "empty": b"",
    "truncated": file_of(f"{{{X}}}", bytes(4)),
    "trailing": file_of(f"{{{X}}}", bytes(12)),
    "header cut": file_of(f"{{{X}}}", bytes(8))[:20],
    "header too long": (1 << 40).to_bytes(8, "little") + bytes(100),
    "not json": file_of("nonsense", bytes(8)),
    "overlap": file_of(f'{{{X},"y":{{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}}}', bytes(12)),
    "hole": file_of(f'{{{X},"y":{{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}}}', bytes(20)),
    "overflow": file_of(
        '{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}', bytes(8)
    ),
    "twice": file_of(f"{{{X},{X}}}", bytes(8)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"bad\.safetensors: .*download or save it again"):
        MappedFile(file)


def test_absent_and_changed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a: no such file"):
        MappedFile(tmp_path / "a")
    save_file({"x": torch.zeros(8)}, tmp_path / "a")
    mapped = MappedFile(tmp_path / "a")
    os.truncate(tmp_path / "a", 20)
    with pytest.raises(ValueError, match="changed since it was opened"):
        mapped.read("x")


def fail_in(target: Path) -> None:
    with staging(target, overwrite=True) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError("stop")


def test_staging_publishes_whole_folders_only(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staging(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    with pytest.raises(FileExistsError, match="out is not an empty folder"), staging(target):
        pytest.fail("the body must not run")
    with pytest.raises(RuntimeError, match="stop"):
        fail_in(target)
    assert [path.name for path in target.iterdir()] == ["sub"]
    with staging(target, overwrite=True) as folder:
        (folder / "b").write_text("3")
        assert (target / "sub" / "a").exists()  # kept until the new one is whole
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_staging_takes_an_empty_folder_but_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staging(tmp_path / "out") as folder:
        (folder / "a").touch()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"), staging(tmp_path / "file", overwrite=True):
        pytest.fail("the body must not run")


KILLED = """
import sys
from trainmerge.system.staging import staging
with staging(sys.argv[1], overwrite=True) as folder:
    (folder / "a").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()  # until it is killed, or its parent has ended
"""


def test_kill_9_keeps_the_old_output_and_disturbs_no_later_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staging(target) as folder:
        (folder / "a").write_text("old")
    command = [sys.executable, "-c", KILLED, str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == "ready\n"
        words = rf"in use by a command that writes it, process {process.pid} on "
        with pytest.raises(ValueError, match=words), staging(target, overwrite=True):
            pytest.fail("the body must not run")
        assert len(list(tmp_path.glob(".out.new-*"))) == 1  # a living process's folder is left alone
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (target / "a").read_text() == "old"
    with staging(target, overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_moved_away_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = tmp_path / f".out.old-{os.uname().nodename}-{dead.pid}-12345678"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(FileExistsError), staging(tmp_path / "out"):
        pytest.fail("the body must not run")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_free_space_is_compared_with_both_numbers(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(OSError, match=r"1050000000000000000 bytes are needed, \d+ are free"):
        check_free_space(tmp_path, 10**18)
    (tmp_path / ".mine").mkdir()
    with pytest.raises(OSError, match=rf"^{tmp_path}/\.mine: 1050"):
        check_free_space(tmp_path / ".mine", 10**18)
    with staging(tmp_path / "out") as new, pytest.raises(OSError, match=rf"^{tmp_path}/out: 1050"):
        check_free_space(new, 10**18)


def test_sha256_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """As large as the file was to be; a living process's, and another machine's, are left alone."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    half, own, other = (
        tmp_path / f".a.safetensors.new-{host}-{process}-12345678"
        for host, process in [
            (os.uname().nodename, dead.pid),
            (os.uname().nodename, os.getpid()),
            ("x", dead.pid),
        ]
    )
    for path in (half, own, other):
        path.touch()
    write_safetensors(tmp_path / "a.safetensors", {"t": (torch.float32, (1,))}, [("t", torch.ones(1))])
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", own.name, other.name}


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"free some space.*a\.safetensors"):
        write_safetensors(tmp_path / "a.safetensors", {"t": (torch.float32, (1,))}, [("t", torch.ones(1))])
    assert list(tmp_path.iterdir()) == []
