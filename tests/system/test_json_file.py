"""JSON of anybody: whatever is wrong, the error names the file and the remedy."""

from pathlib import Path

import pytest

from trainmerge.system.json_file import read_json, read_json_lines

BROKEN = {
    "empty": b"", "cut": b'{"a": [1', "not utf-8": b'{"a": "\xff"}', "deep": b'{"a":' + b"[" * 100_000,
    "binary": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON: .*\. Make it again\.$"):
        read_json(tmp_path / "a.json", "Make it again.")


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("null", "NoneType"), ("3", "int")])
def test_only_objects_are_taken(tmp_path: Path, content: str, kind: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json: not a JSON object, but a {kind}\. Again\."):
        read_json(tmp_path / "a.json", "Again.")


def test_an_absent_file_comes_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.json: no such file\. Restore it\."):
        read_json(tmp_path / "a.json", "Restore it.")


def test_an_incomplete_last_line_is_skipped_and_another_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert read_json_lines(file) == []
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_json_lines(file) == [{"a": 1}, {"a": 2}]
    file.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 is not valid JSON"):
        read_json_lines(file)
    file.write_text("3\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_json_lines(file)
