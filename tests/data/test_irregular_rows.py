"""Files that a reader would take for other texts in silence: marks, cells and names too many."""

import struct
from pathlib import Path

import datasets
import pytest

from trainmerge.data.text_files import load_examples


def read(file: Path, content: str) -> list[str]:
    file.write_bytes(content.encode())
    return list(load_examples(str(file), ["text"])["text"])


@pytest.mark.parametrize("end", ["txt", "csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, end: str) -> None:
    rows = {"txt": "a\r\nb\r\n", "csv": "text\r\na\r\nb\r\n", "jsonl": '{"text": "a"}\r\n{"text": "b"}\r\n'}
    assert read(tmp_path / f"a.{end}", "\ufeff" + rows[end]) == ["a", "b"]


@pytest.mark.parametrize("rows", ["a,0,1\nb,1\n", "one, two,0\nthree, four,1\n"])
def test_a_row_with_more_cells_than_names_is_refused(tmp_path: Path, rows: str) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: .*its rows have more cells than its header has names"):
        read(tmp_path / "a.csv", f"text,label\n{rows}")


def test_a_later_row_with_more_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: .*Expected 2 fields in line 3, saw 3"):
        read(tmp_path / "a.csv", "text,label\na,0\nb,c,1\n")


def test_commas_that_end_each_row_move_no_cell(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "text,label\na,0,\nb,1,\n") == ["a", "b"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: 2 columns are named 'text': rename all but one"):
        read(tmp_path / "a.csv", "text,label,text\na,0,b\n")


def test_two_columns_of_one_name_that_is_not_read_are_fine(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "note,text,note\na,b,c\n") == ["b"]


def test_offsets_out_of_a_saved_dataset_are_an_error_and_no_crash(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["good happy", "bad"]}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    ours, far = (struct.pack("<3i", 0, 10, last) for last in (13, 2**30))
    assert file.read_bytes().count(ours) == 1
    file.write_bytes(file.read_bytes().replace(ours, far))
    with pytest.raises(ValueError, match="saved: not a dataset saved by `save_to_disk`"):
        load_examples(str(tmp_path / "saved"), ["text"])
