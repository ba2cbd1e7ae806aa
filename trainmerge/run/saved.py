"""Which coefficients and snapshots are a run's own: the manifest lists them by SHA-256.

An entry of `saved` is one moment of the run: the step, the number of steps of that fit, and the hashes. It is
written before the files get their names, and stays while one of them is there. So at any moment every file of
the run is listed, and one that is cut short, where a rename is not atomic, or that is of another run, is not.
Manifests of older versions have no such list, and their files are taken as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trainmerge.coefficients.coefficients import Coefficients, save_coefficients
from trainmerge.run.folder import RunFolder
from trainmerge.run.manifest import LOST, write_manifest
from trainmerge.system.atomic import replacing, sync
from trainmerge.system.disk_space import naming
from trainmerge.system.safetensors_file import sha256
from trainmerge.system.temporary_names import aside


class Saved(NamedTuple):
    """One moment of a run."""

    step: int  # of a search: the number of scored merges
    steps: int  # of the fit or search at that moment; as `step` if it was finished
    coefficients: str  # SHA-256
    snapshot: str = ""  # SHA-256; empty without a snapshot


def unfinished(folder: RunFolder) -> str:
    """`step 40 of 80`, or `evaluation 3 of 100` of a search; empty for a finished run and an old manifest.

    Raises:
        ValueError: the coefficients are not the ones that this run saved.
    """
    moment = check_coefficients(folder, folder.read_manifest())
    if moment is None or moment.step >= moment.steps:
        return ""
    return f"{'evaluation' if folder.search.exists() else 'step'} {moment.step} of {moment.steps}"


def unfinished_line(folder: RunFolder) -> str:
    """A sentence about the coefficients of an unfinished run; empty for others. Raises as `unfinished`."""
    at = unfinished(folder)
    return f"{folder.path} is unfinished: its coefficients are those of {at}" if at else ""


def scored_with(folder: RunFolder) -> dict[str, str | int]:
    """What a score of the run's merge is of: the SHA-256 of its coefficients, and their step if it is listed.

    Raises:
        ValueError: the coefficients are not the ones that this run saved.
    """
    moment = check_coefficients(folder, folder.read_manifest())
    if moment is None:
        return {"coefficients": sha256(folder.coefficients)}
    return {"coefficients": moment.coefficients, "step": moment.step}


def scores_are_current(folder: RunFolder, row: Any, file: Path) -> bool:
    """Whether a row of scores in a run's `file` is of the run's coefficients.

    By the SHA-256 in the row; in files of versions that wrote none, by the files' times.
    """
    known = row.get("coefficients") if isinstance(row, Mapping) else None
    if known is not None:
        return bool(known == sha256(folder.coefficients))
    return file.stat().st_mtime_ns >= folder.coefficients.stat().st_mtime_ns


@contextmanager
def new_snapshot(
    folder: RunFolder, coefficients: Coefficients, step: int, steps: int, main: bool = True
) -> Iterator[Path]:
    """A temporary path to write a snapshot to; it then gets its name, and the coefficients are saved.

    Older snapshots are removed. Without `main` (a process other than the first) nothing of this happens.
    """
    path = folder.checkpoints / f"step-{step}.ckpt"
    new = aside(path, "new")
    try:
        with naming(path):
            yield new
        if main:
            sync(new)
            save_moment(folder, coefficients, step, steps, (new, path))
            folder.drop_snapshots_before(step)
    finally:
        new.unlink(missing_ok=True)


def listed_moments(folder: RunFolder, manifest: Mapping[str, Any]) -> list[Saved] | None:
    """The moments of a manifest, the newest first; None for one of an older version.

    Raises:
        ValueError: the list is damaged.
    """
    if "saved" not in manifest:
        return None
    try:
        return [
            Saved(int(e["step"]), int(e["steps"]), str(e["coefficients"]), str(e.get("snapshot", "")))
            for e in manifest["saved"]
        ]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{folder.manifest}: its list `saved` is damaged. {LOST}") from error


def check_coefficients(folder: RunFolder, manifest: Mapping[str, Any]) -> Saved | None:
    """The moment of the run's coefficients; None for a manifest of an older version.

    Raises:
        ValueError: the coefficients are not the ones that this run saved.
    """
    moments = listed_moments(folder, manifest)
    if moments is None:
        return None
    found = sha256(folder.coefficients)
    for moment in moments:
        if moment.coefficients == found:
            return moment
    raise ValueError(
        f"{folder.coefficients}: not the coefficients that this run saved: its SHA-256 is {found[:16]}..., "
        f"manifest.json has {', '.join(f'{m.coefficients[:16]}...' for m in moments) or 'none'}. It was "
        f"changed, is damaged, or is from another run. {LOST}"
    )


def save_moment(
    folder: RunFolder,
    coefficients: Coefficients,
    step: int,
    steps: int,
    snapshot: tuple[Path, Path] | None = None,
) -> None:
    """Save the run's coefficients and, with `snapshot`, its file on disk under its name.

    Args:
        folder: The run.
        coefficients: Its coefficients.
        step: The number of steps taken.
        steps: The number of steps of the fit.
        snapshot: The temporary path of a written snapshot, and its path.
    """
    with replacing(folder.coefficients) as new:
        save_coefficients(coefficients, new)
        made = Saved(step, steps, sha256(new), sha256(snapshot[0]) if snapshot else "")
        announce(folder, made)
    if snapshot:
        snapshot[0].replace(snapshot[1])
        sync(folder.checkpoints)


def announce(folder: RunFolder, made: Saved) -> None:
    """List a moment in the manifest, before its files get their names."""
    manifest = folder.read_manifest()
    there = moments_there(folder, listed_moments(folder, manifest))
    entries = [made, *(moment for moment in there if moment != made)]
    manifest["saved"] = [
        {key: value for key, value in entry._asdict().items() if value != ""} for entry in entries
    ]
    write_manifest(folder.manifest, manifest)


def moments_there(folder: RunFolder, moments: list[Saved] | None) -> list[Saved]:
    """The listed moments of which a file is there; all files there, if there is no list."""
    current = sha256(folder.coefficients) if folder.coefficients.exists() else ""
    snapshots = folder.snapshots()
    if moments is not None:
        return [m for m in moments if m.coefficients == current or (m.snapshot and m.step in snapshots)]
    found = [Saved(step, step, current, sha256(path)) for step, path in snapshots.items()]
    return found or ([Saved(0, 0, current)] if current else [])
