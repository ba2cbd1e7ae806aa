"""A run's report on disk: `index.html`, and one PNG and one CSV per figure."""

import csv
from collections.abc import Iterator
from pathlib import Path

from trainmerge.report.facts import headline, merged_section, origin_section, score_table, usage_section
from trainmerge.report.front import front_picture
from trainmerge.report.heatmap import heatmap
from trainmerge.report.importance import importance_picture
from trainmerge.report.page import Section, drawing, page
from trainmerge.report.picture import Picture, style
from trainmerge.report.read_run import Numbers, read_numbers
from trainmerge.report.routing import routing_picture
from trainmerge.report.scores import score_picture
from trainmerge.report.steps import loss_picture, path_picture
from trainmerge.report.task_vectors import norm_picture, similarity_picture
from trainmerge.system.access import check_folder_place
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.hub import is_hub_id, parse_id
from trainmerge.system.staging import staging

RESOLUTION = 144  # dots per inch
PAGE = "index.html"
ROOM = 1 << 20  # bytes that a report may take


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run and return the path of its page.

    An earlier report in the same folder is replaced once the new one is complete.

    Args:
        run: A run folder with coefficients, finished or not.
        out: The folder to write; by default `report` in the run folder.

    Raises:
        OSError: the disk has no room for it.
        ValueError: no such run, or `out` is a folder that is not a report.
    """
    target = Path(out) if out is not None else Path(run) / "report"
    if target.is_dir() and any(target.iterdir()) and not (target / PAGE).exists():
        raise ValueError(
            f"{target} exists and is not a report: nothing was overwritten. Choose another folder."
        )
    check_folder_place(target.parent)
    check_free_space(target, ROOM)  # before the task vectors are measured
    numbers = read_numbers(run)
    with staging(target, overwrite=True) as folder, style():
        sections = [_shown(picture, folder, numbers) for picture in pictures(numbers)]
        sections += [merged_section(numbers)]
        sections += [usage_section(numbers.usage)] if numbers.usage else []
        sections += [origin_section(numbers.manifest)]
        text = page(numbers.name, _under(numbers), headline(numbers), sections)
        (folder / PAGE).write_text(text, encoding="utf-8")
    return target / PAGE


def pictures(numbers: Numbers) -> Iterator[Picture]:
    """The figures of the run, the most important first."""
    experts, layout, values = numbers.experts, numbers.layout, numbers.values
    yield heatmap(experts, layout, values, numbers.middle, numbers.start is not None)
    if (scores := score_picture(numbers.scores, numbers.metric)) is not None:
        yield scores
    if numbers.routing:
        yield routing_picture(numbers.routing)
    if numbers.trajectory is not None and len(numbers.trajectory.steps) > 1:
        yield path_picture(experts, numbers.trajectory)
    if numbers.losses:
        yield loss_picture(numbers.losses)
    if numbers.geometry is not None:
        if len(experts) > 1:
            yield similarity_picture(experts, numbers.geometry)
        yield norm_picture(experts, numbers.geometry)
        yield importance_picture(layout, values, numbers.geometry)
    if numbers.front is not None:
        yield front_picture(numbers.front)


def _shown(picture: Picture, folder: Path, numbers: Numbers) -> Section:
    """Write a figure's files and return its section of the page."""
    files = [f"{picture.stem}.png", f"{picture.stem}.csv"]
    picture.figure.savefig(folder / files[0], dpi=RESOLUTION, facecolor="white")
    picture.figure.set_layout_engine("none")  # laid out by now: the page's drawing needs it no second time
    with (folder / files[1]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(picture.header)
        writer.writerows(picture.rows)
    body = drawing(picture.figure, picture.stem, picture.alt, files)
    if picture.stem == "scores":
        body += score_table(numbers.scores, numbers.metric)
    return Section(picture.stem, picture.title, picture.words, body)


def _under(numbers: Numbers) -> str:
    names = ", ".join(numbers.experts)
    base = numbers.recipe.base if numbers.recipe else str(numbers.manifest["module"]).rpartition(".")[2]
    notes = "".join(f" {note}" for note in numbers.notes)
    note = f" The task vectors could not be measured: {numbers.missing}" if numbers.missing else ""
    return f"A learned merge of {names} into {_name(base)}.{notes}{note}"


def _name(base: str) -> str:
    """The base's id on the hub, or the last part of its folder."""
    found = parse_id(base) if is_hub_id(base) else None
    return found.repository if found else Path(base).name
