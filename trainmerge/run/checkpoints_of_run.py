"""A configuration that merges checkpoints of one training run, written while the run goes on."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from trainmerge.coefficients.checkpoint_average import CheckpointAverage, Schedule
from trainmerge.run.config import to_config
from trainmerge.system.atomic import write_whole
from trainmerge.system.json_file import read_json

NAME = "merge.yaml"
ADAPTER = "adapter_config.json"
NOTE = "# The average of this run's checkpoints: trainmerge merge THIS_FILE OUT\n"


def write_merge(
    folder: Path, checkpoints: Sequence[Path], last: int | None = None, schedule: Schedule = "equal"
) -> Path | None:
    """Write `folder`/merge.yaml, which averages the checkpoints; returns it, or None for fewer than two.

    The earliest of them is the base. Adapters have their own base, and all of them are experts.

    Args:
        folder: The run's folder.
        checkpoints: Folders of transformers or peft, the earliest first.
        last: Use the last so many; None uses all.
        schedule: Of `CheckpointAverage`.
    """
    used = list(checkpoints)[-last:] if last is not None else list(checkpoints)
    if len(used) < 2:
        return None
    adapter = used[0] / ADAPTER
    if adapter.is_file():
        base = str(read_json(adapter, "Save it again.")["base_model_name_or_path"])
        experts = used
    else:
        base, experts = str(used[0]), used[1:]
    content = {
        "recipe": {"base": base, "experts": {path.name: {"path": str(path)} for path in experts}},
        "model": {"initial": to_config(CheckpointAverage(schedule, from_base=not adapter.is_file()))},
        "trainer": {"max_steps": 0},
    }
    path = folder / NAME
    write_whole(path, NOTE + yaml.safe_dump(content, sort_keys=False, width=110))
    return path
