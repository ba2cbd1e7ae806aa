"""Export a run unless the folder is its export already, so that a command may be given again."""

from pathlib import Path

from trainmerge.checkpoints.whole import COEFFICIENTS, export_manifest
from trainmerge.export.export import export_run
from trainmerge.export.form import DtypeName, Form
from trainmerge.export.public import public
from trainmerge.run.folder import RunFolder
from trainmerge.system.safetensors_file import sha256


def export_once(
    run: Path,
    target: Path,
    overwrite: bool = False,
    workers: int = 1,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
) -> None:
    """`export_run`; without `overwrite`, a folder that is this run's export already stays as it is.

    Raises:
        ValueError: as `export_run`.
    """
    if not overwrite and is_export_of(RunFolder(run), target, Form(dtype, shard_size)):
        print(f"{target} is this run's merge already")
    else:
        export_run(run, target, overwrite, workers, None, dtype, shard_size)


def is_export_of(folder: RunFolder, target: Path, form: Form) -> bool:
    """Whether a folder is the export of the run as it is, in this form."""
    content = export_manifest(target)
    made, files = content.get("run") or {}, content.get("files") or {}
    return (
        made.get("checksums") == public(folder.read_manifest()["checksums"])
        and files.get(COEFFICIENTS) == sha256(folder.coefficients)
        and content.get("form", {}) == form.to_json()
        and not any(content.get(kind) is not None for kind in ("mixture", "adapter", "task"))
    )
