"""Which snapshot a run resumes from."""

import warnings
from pathlib import Path

from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import listed_moments
from trainmerge.system.safetensors_file import sha256


def resume_from(folder: RunFolder, resume: str) -> Path | None:
    """The snapshot for `resume` (auto, never, or a path); None for a new run.

    Raises:
        ValueError: `never` in a folder that has a run, a path that does not exist, or no snapshot is whole.
    """
    if resume == "auto":
        return latest_whole(folder)
    if resume == "never":
        if folder.began:
            raise ValueError(f"{folder.path} already has a run: use --resume auto, or another folder")
        return None
    if not Path(resume).is_file():
        raise ValueError(f"--resume {resume}: no such checkpoint (auto, never, or the path of a .ckpt file)")
    return Path(resume)


def latest_whole(folder: RunFolder) -> Path | None:
    """The latest snapshot that is whole; None without snapshots.

    Raises:
        ValueError: none is whole.
    """
    snapshots = folder.snapshots()
    manifest = folder.read_manifest() if snapshots and folder.manifest.exists() else {}
    moments = listed_moments(folder, manifest)
    latest = folder.latest()
    for step in sorted(snapshots, reverse=True):
        path = snapshots[step]
        if moments is None or (step, sha256(path)) in {(m.step, m.snapshot) for m in moments}:
            if path != latest:
                warnings.warn(f"{latest} is not whole, so the run resumes from {path}", stacklevel=2)
            return path
    if latest is not None:
        raise ValueError(
            f"{latest}: not a snapshot that this run saved, or damaged: its SHA-256 is not in manifest.json. "
            "Restore it from a copy, or remove it and coefficients.safetensors to start anew"
        )
    return None
