"""Read files of texts: JSON, CSV, parquet, plain text, saved datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trainmerge.data.csv_rows import check_header, no_cell_lost
from trainmerge.data.picture_folder import picture_folder
from trainmerge.system.atomic import seen_from
from trainmerge.system.memory import is_out_of_memory
from trainmerge.system.text import reason, shortened

if TYPE_CHECKING:
    import datasets

# By the ending in small letters.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
ROWS = 1 << 16  # of a table in memory


def load_examples(
    path: str,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    numbers: Sequence[str] = (),
    media: Sequence[str] = (),
) -> datasets.Dataset:
    """A JSONL, CSV, parquet or text file, or a dataset saved with `save_to_disk`, as these columns.

    `optional` columns are read if they exist. All columns but `numbers` are texts, as they are written: 007,
    null, NA and 2024-01-31 too. Values of `media` are not decoded. A folder of pictures (`picture_folder`) is
    read as the columns `image` and `label`.

    Raises:
        ValueError: no such file, unknown format, unreadable, no examples, a missing column, or an example
            without its first column.
    """
    data = _read(Path(path), [name for name in (*columns, *optional) if name not in numbers])
    if not len(data):
        raise ValueError(f"{path}: no examples in it")
    absent = [column for column in columns if column not in data.column_names]
    if absent:
        raise ValueError(f"{path}: no column {absent}; it has {shortened(str(data.column_names), 600)}")
    data = _undecoded(data, media)
    try:
        values, *_ = [list(data[column]) for column in columns]
    except Exception as error:  # an arrow file is read here, and may be damaged anywhere
        raise ValueError(f"{path}: damaged, or not in UTF-8: {reason(error)}. Save it again.") from error
    for i, value in enumerate(values):
        if value is None:
            kind = "" if columns[0] in media else ", which must be a text"
            raise ValueError(f"{path}: example {i} has no value for {columns[0]!r}{kind}")
    return data.select_columns([*columns, *(name for name in optional if name in data.column_names)])


def _read(source: Path, texts: Sequence[str]) -> datasets.Dataset:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder{seen_from(source)}")
    if source.is_dir():
        return picture_folder(source) or _saved(source)
    suffix = source.suffix.lower()
    if suffix in COMPRESSED:
        raise ValueError(f"{source}: a compressed file: unpack it, and name the file that it holds")
    if suffix not in FORMATS:
        raise ValueError(
            f"{source}: unknown format; use one of {', '.join(FORMATS)}, or a saved dataset's folder"
        )
    kind = FORMATS[suffix]
    if not source.stat().st_size:
        raise ValueError(f"{source}: the file is empty")
    if kind == "json" and _begins_with_null(source):  # pyarrow would end the process
        raise ValueError(f"{source}: example 0 is null, not an object with columns: remove it")
    options: dict[str, Any] = {}
    if kind == "csv":  # an empty cell is no value; all else is as written
        check_header(source, texts)
        options = {
            "converters": dict.fromkeys(texts, _cell), "keep_default_na": False, "na_values": [""],
            "index_col": False,  # never a row's first cell instead of its first column
        }  # fmt: skip
    if kind == "text":
        options = {"encoding": "utf-8-sig"}  # without the byte order mark that some editors write
    if kind == "parquet":  # by default as many rows at a time as the first group has, perhaps none
        options = {"batch_size": ROWS}
    try:
        data = _in_memory(source, kind, options)
        return _undated(data, source, texts) if kind == "json" else data
    except Exception as error:  # pyarrow's and datasets' own, and whatever they let through
        cause = error.__cause__ or error  # the reader's own error, before it was wrapped
        if is_out_of_memory(cause):
            raise MemoryError(f"no memory is left to read {source}: {reason(cause)}") from error
        raise ValueError(f"{source}: cannot be read as {kind} in UTF-8: {reason(cause)}") from error


def _in_memory(source: Path, kind: str, options: Mapping[str, Any]) -> datasets.Dataset:
    """The rows of a file, streamed: a converted copy on disk would outlive a killed process.

    Only a lock without contents and a link to the file are written, to a temporary folder. datasets takes the
    link's name: it would read `[1]`, `*` and `::` of the file's own path as patterns and addresses.
    """
    import datasets  # takes half a second, which an export need not spend

    with TemporaryDirectory() as place, _quiet(), no_cell_lost():
        link = Path(place) / f"rows{source.suffix.lower()}"
        link.symlink_to(source.absolute())
        rows = datasets.load_dataset(
            kind, data_files=str(link), split="train", streaming=True, cache_dir=place, **options
        )
        tables = [*rows.with_format("arrow").iter(batch_size=ROWS)]
    if not tables:
        return datasets.Dataset.from_dict({})
    # A fingerprint that is given spares the hash of all rows, which names cached copies that we never write.
    parts = [datasets.Dataset(table, fingerprint=f"{i:016x}") for i, table in enumerate(tables)]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _begins_with_null(source: Path) -> bool:
    with source.open("rb") as file:
        return next((line for line in file if line.strip()), b"").lstrip().startswith(b"null")


def _cell(written: str) -> str | None:
    return written or None


def _undated(data: datasets.Dataset, source: Path, texts: Sequence[str]) -> datasets.Dataset:
    """Columns of JSON texts that all look like dates, which the reader takes for times, as texts again."""
    for name in texts:
        if str(getattr(data.features.get(name), "dtype", "")).startswith(("timestamp", "date", "time")):
            content = source.read_text(encoding="utf-8")
            rows = json.loads(content) if content.lstrip().startswith("[") else content.splitlines()
            values = [(json.loads(row) if isinstance(row, str) else row).get(name) for row in rows if row]
            data = data.add_column(f"{name} as written", values).remove_columns(name)
            data = data.rename_column(f"{name} as written", name)
    return data


def _saved(folder: Path) -> datasets.Dataset:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.Dataset):  # offsets that lead out of the file would end the process
            data.data.table.validate(full=True)
    except Exception as error:  # as in `_read`
        raise ValueError(
            f"{folder}: not a dataset saved by `save_to_disk`: {type(error).__name__}: {reason(error)}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(f"{folder}: has the splits {list(data)}; name the folder of one, {folder}/SPLIT")
    return data


def _undecoded(data: datasets.Dataset, media: Sequence[str]) -> datasets.Dataset:
    """The columns of pictures and sounds as paths and bytes."""
    import datasets

    for name in media:
        feature = data.features[name]
        if isinstance(feature, datasets.Image | datasets.Audio) and feature.decode:
            data = data.cast_column(name, type(feature)(decode=False))
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable progress bars, and the log lines of errors that we raise ourselves."""
    import datasets

    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    if verbosity != CRITICAL:
        datasets.logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        if verbosity != CRITICAL:
            datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
