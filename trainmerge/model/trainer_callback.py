"""transformers' Trainer leaves a run whose checkpoints can be merged."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from trainmerge.coefficients.checkpoint_average import Schedule
from trainmerge.run.checkpoints_of_run import write_merge
from trainmerge.system.ranges import check_option

PREFIX = "checkpoint-"


class MergeCheckpoints(TrainerCallback):
    """After each checkpoint of a `Trainer`, write `output_dir`/merge.yaml, which averages the last ones.

    `trainmerge merge OUTPUT_DIR/merge.yaml OUT` then merges them, and the file is a configuration of
    `trainmerge fit` like any other. Only checkpoints that are still there (`save_total_limit`) are named.
    Models and adapters are supported.

    Args:
        last: Average the last so many checkpoints.
        schedule: Of `trainmerge.CheckpointAverage`.
    """

    def __init__(self, last: int = 8, schedule: Schedule = "equal") -> None:
        check_option("MergeCheckpoints.last", last, int, "[2, inf)")
        check_option("MergeCheckpoints.schedule", schedule, Schedule)
        self.last, self.schedule = last, schedule

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file, in the first process."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)).absolute()
            write_merge(folder, checkpoints_of(folder), self.last, self.schedule)


def checkpoints_of(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, the earliest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))
