"""Verify packed experts: pack the run's again and compare."""

from pathlib import Path

from trainmerge.checkpoints.whole import MANIFEST, PACKED, export_manifest
from trainmerge.packed.export_packed import export_packed
from trainmerge.packed.form import PackedForm
from trainmerge.packed.record import read_record
from trainmerge.system.atomic import temporary_folder
from trainmerge.system.safetensors_file import MappedFile, sha256
from trainmerge.system.text import listed

SHOWN = 5  # files in an error


def verify_packed(run: str | Path, out: str | Path) -> int:
    """Pack a run's experts again, beside the folder `out`, and compare; returns the number of tensors.

    The bytes are equal on the same processor with the same number of threads: factors are of an SVD.

    Raises:
        FileNotFoundError: no folder of packed experts.
        ValueError: names the files that differ, or a damaged folder.
    """
    folder = Path(out)
    record = read_record(folder)
    content = export_manifest(folder).get("packed")
    try:
        form = PackedForm(**(content or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST}: its `packed` is damaged ({error}). Export again.") from error
    whole = folder.resolve()
    with temporary_folder(whole.parent, f"{whole.name}.verify") as place:
        again = export_packed(run, place, form)
        files = {PACKED, *record.files, *(path.name for path in again.glob("*.safetensors"))}
        wrong = sorted(name for name in files if not _same(folder / name, again / name))
    if wrong:
        raise ValueError(
            f"{folder} is not packed of {run}; export it again. It differs in {listed(wrong, SHOWN)}"
        )
    return sum(len(MappedFile(folder / file).tensors) for file in record.files)


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and sha256(one) == sha256(other)
