"""`trainmerge auto`; heavy imports inside, as in `commands`."""

import sys
from typing import TYPE_CHECKING

from trainmerge.system.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainmerge.auto import Choice


def auto(
    configuration: str,
    out: str,
    run: str | None = None,
    held_out: float = 0.2,
    minutes: float | None = None,
    memory: str | None = None,
    overwrite: bool = False,
    learn: bool = True,
) -> None:
    """Choose start and method by held-out unlabeled examples, and export the best merge.

    It judges task arithmetic, the configuration's own start and closed forms at several scales, learns from
    the two best (eight coefficients per tensor where the granularity is tensor), and keeps the best of all.
    No label is read. The same command resumes.

    Examples: trainmerge auto configs/demo.yaml merged/
              trainmerge auto configs/demo.yaml merged/ --minutes 10
              trainmerge auto configs/demo.yaml merged/ --learn false

    Args:
        configuration: A configuration of `trainmerge fit`.
        out: The folder of the merged checkpoint.
        run: The folder of everything that is tried; by default OUT-auto.
        held_out: Share of each expert's examples to judge by; nothing is learned from them.
        minutes: Begin no further trial after this time; by default all are made.
        memory: Memory limit of the fits, such as 8GiB.
        overwrite: Replace the folder OUT if it exists.
        learn: Learn from the two best starts; false keeps the best start at its best scales.
    """
    keep_freed_memory()
    from trainmerge.auto import auto_config
    from trainmerge.fitting.snapshots import Preempted

    try:
        choice = auto_config(configuration, out, run, held_out, minutes, memory, overwrite, learn)
    except Preempted as stop:
        print(f"trainmerge auto: {stop}", file=sys.stderr)
        raise SystemExit(stop.code) from stop
    print_choice(choice)
    print(f"merged checkpoint: {out}, from {choice.run}")


def print_choice(choice: "Choice") -> None:
    """Print the best trial of every row, the best first."""
    from trainmerge.system.console import print_table

    order = sorted(choice.rows, key=lambda name: -choice.rows[name].mean)
    rows = []
    for name in order:
        trial = choice.rows[name]
        scales = ", ".join(f"{scale:.2f}" for scale in dict.fromkeys(trial.scales))
        mark = " (chosen)" if name == choice.best else ""
        rows.append([name + mark, scales, f"{trial.mean:.3f}", f"{trial.worst:.3f}"])
    title = "recovered of the experts on held-out examples: 1 is the expert, 0 the base"
    print_table(title, ["start", "scale", "mean", "worst expert"], rows)
