"""The first process before a fit: check the resumed run, write the run's description, rewind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import yaml

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.provenance import describe, load_snapshot
from trainmerge.fitting.rewind import rewind
from trainmerge.run.config import read_yaml, write_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.generated_texts import WRITTEN
from trainmerge.run.hub_origins import moved_revisions, origins, recorded_origins, to_json
from trainmerge.run.manifest import differences
from trainmerge.run.resume import resume_from
from trainmerge.system.atomic import write_whole

LEARNED_BY = ("seed_everything", "recipe", "model", "data")  # sections of a configuration


class Snapshot(NamedTuple):
    """A fit's checkpoint and its path."""

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return int(self.content["global_step"])


def find_snapshot(folder: RunFolder, resume: str, first: bool) -> Snapshot | None:
    """The snapshot for `resume` (auto, never, or a path); None for a new run.

    For `never`, only the `first` process checks that the folder has no run; others might see its new one.

    Raises:
        ValueError: `never` in a folder that has a run, a path that does not exist, or a damaged file.
    """
    path = None if resume == "never" and not first else resume_from(folder, resume)
    return Snapshot(path, load_snapshot(path)) if path else None


def begin_run(
    folder: RunFolder,
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    snapshot: Snapshot | None,
    config: str | None,
) -> None:
    """Write the run's description, and remove everything later than the snapshot.

    Raises:
        ValueError: non-finite weights; the folder's run or the snapshot has different experts, data or
            settings.
    """
    made = json.loads(snapshot.content["trainmerge"]) if snapshot else {}
    if folder.began and folder.manifest.exists():
        made = folder.read_manifest()
    module.opened.verify(made.get("checksums"))
    description = describe(module, data)
    commits = origins(module.opened.folders)
    changed = [by_key(folder, config), moved_revisions(recorded_origins(made, folder.manifest), commits)]
    folder.check(description, "\n".join(lines for lines in changed if lines))
    if snapshot and (different := differences(json.loads(snapshot.content["trainmerge"]), description)):
        raise ValueError(f"{snapshot.path} was made with different experts, data or settings:\n{different}")
    module.description = json.dumps(description)
    known = {key: made[key] for key in (WRITTEN,) if key in made}
    folder.create({**description, **known}, to_json(commits))
    write_config(module.recipe, "recipe", folder.recipe)
    module.opened.save(folder.sources)
    if config:
        write_whole(folder.config, config)
    if snapshot:
        print(f"{folder.path}: resuming after step {snapshot.step}", flush=True)
    experts, groups = module.coefficients.raw.shape
    rewind(folder, snapshot.step if snapshot else 0, (experts, groups), trainer.loggers)
    if snapshot and snapshot.path == folder.snapshots().get(snapshot.step):
        folder.drop_snapshots_before(snapshot.step)  # those of a process killed right after it saved


def by_key(folder: RunFolder, config: str | None) -> str:
    """The settings of a configuration that differ from the run's own `config.yaml`; empty without both."""
    if not config or not folder.config.is_file():
        return ""
    try:
        before, now = read_yaml(folder.config), yaml.safe_load(config)
    except ValueError:  # damaged: the fit writes it again
        return ""
    both = [
        {key: content.get(key) for key in LEARNED_BY}
        for content in (before, now)
        if isinstance(content, Mapping)
    ]
    return differences(*both) if len(both) == 2 else ""
