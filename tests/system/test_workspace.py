"""The cache: a file is made once, and a damaged one says that it may be removed."""

from pathlib import Path

import pytest
import torch

from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.workspace import cached, digest, metadata_of, open_cached


def test_a_file_is_made_once_and_a_damaged_one_says_what_to_do(tmp_path: Path) -> None:
    file, made = tmp_path / "workspace" / "a.safetensors", []

    def make(path: Path) -> None:
        made.append(path)
        write_safetensors(path, {"x": (torch.float32, (2,))}, [("x", torch.ones(2))])

    for _ in range(2):
        assert cached(file, make).read("x").tolist() == [1.0, 1.0]
    assert made == [file]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"Remove {file}: it is made again when it is needed"):
        cached(file, make)
    file.unlink()  # as the error said
    assert cached(file, make).read("x").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "its header has no 'names'"),
        ({"names": "[1,"}, "'names' of its header: not valid JSON"),
        ({"names": '["a"]'}, "it has no tensor 'y'"),
    ],
)
def test_a_damaged_header_says_what_to_do(tmp_path: Path, metadata: dict[str, str], words: str) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": (torch.float32, (2,))}, [("x", torch.ones(2))], metadata)
    with pytest.raises(ValueError, match=rf"^{path}: .*{words}.* Remove {path}: it is made again"):
        metadata_of(open_cached(path), "names", ["x", "y"] if "tensor" in words else ["x"])


def test_metadata_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": (torch.float32, (2,))}, [("x", torch.ones(2))], {"names": '["a", 1]'})
    assert metadata_of(open_cached(path), "names", ["x"]) == ["a", 1]


def test_digests_are_of_the_text() -> None:
    assert digest("abc") == "ba7816bf8f01cfea"
    assert len(digest("abc", length=64)) == 64
