"""Columns of texts are read as they are written, whatever their words look like."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, read_examples
from trainmerge.data.text_files import load_examples


@pytest.mark.parametrize(
    "texts",
    [["null", "NA", "None", "nan"], ["12", "007", "1e5"], ["True", "False"], ["2024-01-31", "2024-02-01"]],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt"])
def test_words_that_look_like_something_else_stay_texts(
    tmp_path: Path, suffix: str, texts: list[str]
) -> None:
    rows = [f'{{"text": "{text}"}}' for text in texts]
    content = {
        "csv": "text,label\n" + "".join(f"{text},1\n" for text in texts),
        "jsonl": "\n".join(rows),
        "json": "[" + ",".join(rows) + "]",
        "txt": "\n".join(texts),
    }[suffix]
    file = tmp_path / f"texts.{suffix}"
    file.write_text(content)
    assert list(load_examples(str(file), ["text"])["text"]) == texts


def test_labels_are_still_numbers_and_an_empty_cell_no_text(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,label\nnull,1\n7,0\n")
    assert list(load_examples(str(file), ["text", "label"], numbers=["label"])["label"]) == [1, 0]
    file.write_text("text,label\nred,1\n,0\n")
    with pytest.raises(ValueError, match="example 1 has no value for 'text'"):
        load_examples(str(file), ["text", "label"], numbers=["label"])


def test_a_column_of_texts_is_no_column_of_spans(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "red blue"}\n')
    words = rf"{file}: example 0 has 'red blue' for 'text' \(data\.columns\.spans\): spans are lists"
    with pytest.raises(ValueError, match=words):
        read_examples(str(file), Columns(spans="text"), lambda _: Example(""))


@pytest.mark.parametrize("groups", [(), (0,), (0, 2)])
def test_empty_groups_of_rows_in_a_parquet_file(tmp_path: Path, groups: tuple[int, ...]) -> None:
    file = tmp_path / "texts.parquet"
    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in groups:
            writer.write_table(pyarrow.table({"text": ["red", "blue"][:rows]}, schema))
    if any(groups):
        assert list(load_examples(str(file), ["text"])["text"]) == ["red", "blue"]
    else:
        with pytest.raises(ValueError, match=rf"{file}: no examples in it"):
            load_examples(str(file), ["text"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_no_copy_of_the_texts_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "hidden words"}\n' if name == "a.jsonl" else "text\nhidden words\n")
    code = (
        "import sys, os\n"
        "written = []\n"
        "def note(event, arguments):\n"
        "    if event == 'open' and str(arguments[1]).startswith(('w', 'a', 'x')):\n"
        "        written.append(str(arguments[0]))\n"
        "sys.addaudithook(note)\n"
        "import datasets\n"
        "from trainmerge.data.text_files import load_examples\n"
        "written.clear()\n"
        f"assert 'hidden words' in load_examples({str(path)!r}, ['text'])['text']\n"
        "assert not [file for file in written if not file.endswith('.lock')], written\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_rows_are_one_table(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    rows = (1 << 16) + 3
    path.write_text("".join(f'{{"text": "{i}", "label": {i % 7}}}\n' for i in range(rows)))
    data = load_examples(str(path), ["text", "label"], numbers=["label"])
    assert data["text"][:] == [str(i) for i in range(rows)]
    assert data["label"][-1] == (rows - 1) % 7


@pytest.mark.parametrize("content", ["null", ' null\n{"text": "a"}\n'])
def test_a_file_that_begins_with_null_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"texts\.jsonl: example 0 is null"):
        load_examples(str(file), ["text"])


@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "a.CSV", "a.TXT", "a.Parquet"])
def test_the_case_of_an_ending_and_patterns_in_a_path_change_nothing(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mein Ordner [1] *?" / "{x} #$HOME 模型" / name
    file.parent.mkdir(parents=True)
    content = {
        "A.JSONL": '{"text": "red"}\n{"text": "blue"}\n', "a.Json": '[{"text": "red"}, {"text": "blue"}]',
        "a.CSV": "text\nred\nblue\n", "a.TXT": "red\nblue\n",
    }  # fmt: skip
    if name in content:
        file.write_text(content[name])
    else:
        parquet.write_table(pyarrow.table({"text": ["red", "blue"]}), file)
    assert list(load_examples(str(file), ["text"])["text"]) == ["red", "blue"]


def test_a_compressed_file_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(b'{"text": "red"}'))
    with pytest.raises(ValueError, match=r"texts\.jsonl\.gz: a compressed file: unpack it"):
        load_examples(str(tmp_path / "texts.jsonl.gz"), ["text"])
