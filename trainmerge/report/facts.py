"""Tables of a run: what was merged, time and memory, and how to reproduce it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainmerge.report.page import Section, table
from trainmerge.report.read_run import Numbers
from trainmerge.run.scores import Metric, Scores, score_rows


def headline(numbers: Numbers) -> list[tuple[str, str]]:
    """The key figures at the top of the page."""
    steps = int(numbers.trajectory.steps[-1]) if numbers.trajectory else 0
    facts = [
        ("experts", str(len(numbers.experts))),
        ("coefficients", f"{numbers.values.numel():,}"),
        ("steps", str(max([steps, *(int(line["last_step"]) for line in numbers.usage)]))),
    ]
    if numbers.usage:
        facts += [
            ("time", duration(sum(line["wall_seconds"] for line in numbers.usage))),
            ("peak memory", size(max(line["peak_bytes"] for line in numbers.usage))),
        ]
    relative = numbers.metric.normalised(numbers.scores).get("learned")
    if relative is not None:
        facts.append(("experts' level", f"{100 * relative:.1f}%"))
    return facts


def score_table(scores: Scores, metric: Metric) -> str:
    """The table that `trainmerge evaluate` prints."""
    means = {row: metric.mean(own) for row, own in scores.items()}
    header, rows = score_rows(metric.name, scores, means, metric.normalised(scores))
    names = list(scores)
    return table(header, rows, best=names.index("learned") if "learned" in names else -1)


def merged_section(numbers: Numbers) -> Section:
    """Base, experts, and which parameters are merged or unchanged."""
    layout, recipe = numbers.layout, numbers.recipe
    if recipe is None:
        rows = [["base", str(numbers.manifest["module"]), ""]]
        rows += [[name, "a module in memory", "loaders of its own"] for name in numbers.experts]
        made = numbers.manifest["recipe"]
        grain = str(made.get("grouping", {}).get("granularity", ""))
        done = [str(one.get("class_path", one)) for one in made.get("preprocess", [])]
    else:
        rows = [["base", recipe.base, ""]]
        rows += [[n, e.path, str(e.calibration or "no calibration data")] for n, e in recipe.experts.items()]
        grain, done = recipe.grouping.granularity, [repr(one) for one in recipe.preprocess]
    body = table(["name", "folder", "calibration"], rows, wide=True)
    reasons = Counter(layout.excluded.values())
    kept = [
        [reason, str(count), ", ".join(_some(layout.excluded, reason))] for reason, count in reasons.items()
    ]
    if layout.fixed:
        kept.append(["merged at the starting coefficient (0 chunks)", str(len(layout.fixed)), ""])
    if kept:
        body += table(["unchanged from the base", "parameters", "examples"], kept, wide=True)
    preprocess = ", ".join(done) or "no preprocessing"
    words = (
        f"{len(layout.groups)} parameters are merged, with {len(layout.labels)} coefficients per expert "
        f"({grain}); {preprocess}."
    )
    return Section("merged", "What was merged", words, body)


def usage_section(usage: Sequence[Mapping[str, Any]]) -> Section:
    """Seconds and memory, one row per process."""
    rows = []
    for line in usage:
        steps = line["last_step"] - line["first_step"]
        rows.append(
            [
                f"{line['first_step']} to {line['last_step']}",
                duration(line["wall_seconds"]),
                duration(line["cpu_seconds"]),
                f"{line['wall_seconds'] / steps:.2f} s" if steps else "",
                size(line["peak_bytes"]),
                size(line["anonymous_bytes"]) if line["anonymous_bytes"] else "",
                f"{line['processes']} x {line['threads']}",
            ]
        )
    header = [
        "steps",
        "wall",
        "CPU",
        "per step",
        "peak resident",
        "private, at the end",
        "processes x threads",
    ]
    words = (
        "One row per process of the run, including loading and recording. Peak resident memory includes "
        "mapped files, whose pages the kernel can reclaim; private memory excludes them. Killed processes "
        "leave no row."
    )
    return Section("usage", "Time and memory", words, table(header, rows))


def origin_section(manifest: Mapping[str, Any]) -> Section:
    """Command, seed, settings and versions."""
    started = manifest.get("started", {})
    rows = [["command", started.get("command", "")], ["folder", started.get("folder", "")]]
    if last := manifest.get("resumed", {}).get("command"):
        rows.append(["last command", last])
    rows += [["seed", str(manifest.get("data", {}).get("seed", ""))]]
    rows += [["versions", ", ".join(f"{n} {v}" for n, v in manifest.get("versions", {}).items())]]
    rows += [
        [key, _plain(manifest[key])]
        for key in ("objective", "constraint", "anchor", "optimizer")
        if key in manifest
    ]
    words = "What is needed to reproduce the run. manifest.json also has a checksum of every file."
    return Section("origin", "How to reproduce it", words, table(["setting", "value"], rows, wide=True))


def duration(seconds: float) -> str:
    """Seconds in readable units.

    >>> duration(12.3), duration(150), duration(7300)
    ('12.3 s', '2 min 30 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def _some(excluded: Mapping[str, str], reason: str) -> list[str]:
    return [name for name, why in excluded.items() if why == reason][:3]


def _plain(value: Any) -> str:
    """A plug-in in Python syntax; settings as name=value; other text on one line."""
    if isinstance(value, Mapping) and "class_path" in value:
        settings = ", ".join(f"{k}={v}" for k, v in value.get("init_args", {}).items())
        return f"{str(value['class_path']).rpartition('.')[2]}({settings})"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return " ".join(str(value).split())
