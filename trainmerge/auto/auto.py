"""`trainmerge auto`: judge starts on held-out examples, learn from the best ones, export the best merge.

    every start at several scales -> the two best, one scale per expert -> learn from each -> the best of all

No label is read. All of it is in one folder; a killed search goes on where it stopped.

Legend: `K` experts, `G` coefficient groups.
"""

import json
from pathlib import Path

from trainmerge.auto.choice import Choice
from trainmerge.auto.search import AutoSearch
from trainmerge.export.export_once import export_once, is_export_of
from trainmerge.export.form import Form
from trainmerge.report import write_report
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use
from trainmerge.system.atomic import write_whole
from trainmerge.system.ranges import check_option
from trainmerge.system.staging import refuse_occupied


def auto_config(
    config: str | Path,
    out: str | Path,
    run: str | Path | None = None,
    held_out: float = 0.2,
    minutes: float | None = None,
    memory: str | None = None,
    overwrite: bool = False,
    learn: bool = True,
) -> Choice:
    """Choose start and method for a configuration by held-out examples, and export the best merge.

    Args:
        config: A configuration of `trainmerge fit`; objective, optimizer, steps and grouping are used for
            learning; where the granularity is `tensor`, eight coefficients per tensor are learned.
        out: The folder of the merged checkpoint.
        run: The folder of everything that is tried; by default `OUT-auto` beside `out`.
        held_out: Share of each expert's examples to judge by; nothing is learned from them.
        minutes: Begin no further trial after this time; by default all are made.
        memory: The memory limit of the fits, such as `8GiB`.
        overwrite: Replace `out` if it exists.
        learn: Learn from the two best starts; False exports the best start at its best scales.

    Raises:
        ValueError: as `from_config`, `fit` and `export_run`; an expert has no examples to hold out.
            `run` is `out` or inside it.
        FileExistsError: `out` exists, is not this search's merge, and `overwrite` is not set.
    """
    check_option("held_out", held_out, float, "(0, 0.5]")
    check_option("minutes", minutes, float | None, "(0, inf)")
    target = Path(out)
    place = Path(run) if run is not None else target.with_name(f"{target.name}-auto")
    _refuse(target, place, overwrite)
    with in_use(RunFolder(place), "trainmerge auto"):
        choice = AutoSearch(Path(config), place, held_out, minutes, memory).choose(learn)
        write_whole(place / "auto.json", json.dumps(choice.to_json(), indent=2))
        export_once(choice.run, target, overwrite)
        write_report(choice.run)
    return choice


def _refuse(target: Path, place: Path, overwrite: bool) -> None:
    """Refuse, before the search, a target that is occupied or holds the search."""
    if place.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"the search's folder {place} is {target}, or inside it; choose another (--run)")
    if not _is_earlier_merge(target, place):
        refuse_occupied(target.resolve(), overwrite)


def _is_earlier_merge(target: Path, place: Path) -> bool:
    """Whether a folder is the export of what a search chose before; False where that is damaged."""
    try:
        return is_export_of(RunFolder(Choice.read(place).run), target, Form())
    except (ValueError, FileNotFoundError):
        return False
