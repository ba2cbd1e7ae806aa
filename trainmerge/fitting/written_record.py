"""Which texts experts wrote for a run, by their SHA-256 in its manifest and its snapshots."""

import json

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.run.generated_texts import GENERATED, WRITTEN
from trainmerge.run.manifest import differences, write_manifest
from trainmerge.system import distributed


def keep_generated(folder: RunFolder, module: MergeModule, data: Calibration) -> None:
    """Record in the run's manifest which texts its experts wrote, or compare them with those of its record.

    Another processor, or another version of torch, may write other texts from the same settings.

    Raises:
        ValueError: the run learned from other texts.
    """
    if not data.written:
        return
    other = distributed.broadcast(_other_texts(folder, data) if distributed.rank() == 0 else "")
    if other:
        raise ValueError(other)
    module.description = json.dumps({**json.loads(module.description), WRITTEN: data.written})


def _other_texts(folder: RunFolder, data: Calibration) -> str:
    """The words about texts that differ from the run's; without a record, it is written."""
    manifest = folder.read_manifest()
    if WRITTEN not in manifest:
        write_manifest(folder.manifest, {**manifest, WRITTEN: data.written})
    different = differences({WRITTEN: manifest.get(WRITTEN, data.written)}, {WRITTEN: data.written})
    return different and (
        f"{folder.path} learned from other texts of its experts than those in its workspace:\n{different}\n"
        f"Restore {GENERATED}NAME-....jsonl from a copy, or fit again in another folder: another processor "
        "writes other texts."
    )
