"""What `trainmerge inspect --suggest` says of `trainmerge auto`: what it would do, or what it chose."""

import shlex
import warnings
from pathlib import Path

from trainmerge.auto import Choice, Preview, finished_search, preview_auto
from trainmerge.plan.plan import Plan
from trainmerge.report.facts import duration
from trainmerge.system.console import print_table


def print_preview(config: str, out: str, suggested: Path, plan: Plan | None) -> None:
    """Print starts, time and commands of `trainmerge auto CONFIG OUT`, and what it chose if it has run.

    Args:
        config: The configuration's file.
        out: The folder that it would write.
        suggested: The file of the suggested configuration.
        plan: The plan of the configuration's fit, if there is one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inspect has printed them
            preview = preview_auto(Path(config))
    except (ValueError, OSError) as error:
        print(f"trainmerge auto would refuse {config}: {' '.join(str(error).split())}")
    else:
        _print_starts(preview)
        print(_words(preview, plan))
        _print_earlier(preview, Path(out))
    for title, words in _commands(config, out, suggested):
        print(f"{title}: {words}")


def _print_starts(preview: Preview) -> None:
    rows = [[s.name, ", ".join(f"{scale:g}" for scale in s.scales), ""] for s in preview.tried]
    rows += [[name, "", f"left out: {reason}"] for name, reason in preview.left_out.items()]
    print_table("trainmerge auto would judge", ["start", "scales tried first", "remark"], rows)


def _words(preview: Preview, plan: Plan | None) -> str:
    """What is judged and learned, and how long it takes."""
    return (
        f"trainmerge auto judges at most {preview.merges} merges by {preview.judge} on at most "
        f"{preview.examples} examples per expert, learns by {preview.objective} in {preview.fits} fits of at "
        f"most {preview.steps} steps, and exports the best; "
        f"{_time(preview, plan)}"
    )


def _time(preview: Preview, plan: Plan | None) -> str:
    if plan is None:
        return "there is no plan, so no estimate of its time"
    computing = plan.seconds["forward and backward"]
    judging = preview.judging_seconds(computing, plan.step_seconds - computing)
    learning = preview.fits * preview.steps * plan.step_seconds
    return (
        f"by the plan at most {duration(judging + learning)}, {duration(judging)} of it to judge; loading "
        "and closed forms are not counted"
    )


def _print_earlier(preview: Preview, out: Path) -> None:
    """What an earlier `trainmerge auto` with the same OUT chose, or that it goes on."""
    place = out.with_name(f"{out.name}-auto")
    if (choice := finished_search(place, preview.recipe)) is not None:
        print(f"{place}: {_chosen(choice)}")
    elif (place / "auto.json").is_file():
        print(f"{place}: holds a search of another recipe; give another --out")
    elif (place / "trials.jsonl").is_file():
        print(f"{place}: holds a search that has not ended; the same command goes on")


def _chosen(choice: Choice) -> str:
    best = choice.rows[choice.best]
    scales = ", ".join(f"{scale:.2f}" for scale in dict.fromkeys(best.scales))
    return (
        f"trainmerge auto chose {choice.best} (scale {scales}), which recovers {best.mean:.3f} of the "
        f"experts on held-out examples, {best.worst:.3f} of the worst one; its run is {choice.run}"
    )


def _commands(config: str, out: str, suggested: Path) -> list[tuple[str, str]]:
    """Titles and commands."""
    auto, run = ["trainmerge", "auto", config, out], f"{Path(out)}-run"
    still = ["trainmerge", "fit", str(suggested), run, "--trainer.max_steps", "0"]
    return [
        ("let held-out examples choose", shlex.join(auto)),
        ("instead, the same without learning", shlex.join([*auto, "--learn", "false"])),
        (
            "instead, the suggested start alone, nothing judged",
            f"{shlex.join(still)} && {shlex.join(['trainmerge', 'export', run, out])}",
        ),
    ]
