"""Write every table of results in README and the documentation, from what `tests/results` has.

A page has `<!-- NAME -->` and `<!-- /NAME -->`; what lies between them is a table of `TABLES`:

    .venv/bin/python -m tests.result_tables
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests import (
    closed_suite,
    embed_suite,
    head_suite,
    held_out_rows,
    held_out_scores,
    lm_suite,
    results,
    suite,
    survey,
    vision_starts,
    vision_suite,
)
from tests.bench import paper

PAGES = (Path("README.md"), *sorted(Path("notebooks/docs").rglob("*.md")))
GUARDS = (  # in the order of their table
    "plain_entropy_gain",
    "diversity_entropy_gain",
    "box_entropy_gain",
    "anchor_entropy_gain",
    "slow_entropy_gain",
    "scaled_entropy_gain",
    "guard_gain",
    "guard_gain_200_steps_later",
)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def bench(group: str) -> dict[str, Any]:
    """What `make bench` gave for one group of figures."""
    content: dict[str, Any] = json.loads((results.FOLDER / "bench" / f"{group}.json").read_text())
    return content


def demo() -> str:
    """The accuracies that `make demo` ends with."""
    scores = json.loads((results.FOLDER / "demo.json").read_text())["scores"]
    head = ["accuracy", *next(iter(scores.values()))]
    bold = {"learned": "**learned**"}
    rows = [[bold.get(name, name), *(f"{v:.3f}" for v in row.values())] for name, row in scores.items()]
    return markdown(head, rows)


def guard() -> str:
    """What keeps entropy honest, by mean accuracy on the demo's test texts."""
    found = {row["name"]: row for row in bench("guard")["figures"]}
    rows = [[found[name]["what"], f"{found[name]['value']:+.3f}"] for name in GUARDS]
    return markdown(["loss", "mean accuracy, minus that of the best uniform coefficient"], rows)


def front() -> str:
    """How well the surrogate of `trainmerge pareto` predicts unseen merges."""
    values = {row["name"]: f"{row['value']:g}" for row in bench("tradeoffs")["figures"]}
    names = {
        "rank_correlation": "Spearman's correlation of predicted and measured losses",
        "r2": "R2 of the same",
    }
    rows = [
        [title, *(values[f"surrogate_{name}_{n}_merges"] for n in (6, 16))] for name, title in names.items()
    ]
    return markdown(["worst of five tasks", "6 merges", "16 merges"], rows)


def figures(group: str) -> str:
    """The figures of one group, with how and where they were measured."""
    content = bench(group)
    rows = [
        [f"`{row['name']}`", shown(row["value"]), row["unit"], row["bar"], row["what"]]
        for row in content["figures"]
    ]
    table = markdown(["figure", "value", "unit", "bar", "of what"], rows)
    source = f"`{content['command']}`; {content['machine']}; {content['versions']}."
    return f"{content['about']}\n\n{table}\n\n{source}"


def shown(value: float | str) -> str:
    """A figure in as many digits as were written down."""
    if value is None:
        return "not measured"
    return value if isinstance(value, str) else f"{value:.6g}"


def by_method(group: str, title: str) -> str:
    """The figures of a group whose texts are `METHOD: FIGURE`: a row per method, a column per figure."""
    content = bench(group)
    found: dict[str, dict[str, float]] = {}
    for row in content["figures"]:
        method, figure = row["what"].split(": ", 1)
        found.setdefault(method, {})[figure] = row["value"]
    columns = list(dict.fromkeys(figure for own in found.values() for figure in own))
    rows = [
        [f"`{method}`", *(shown(own[column]) if column in own else "" for column in columns)]
        for method, own in found.items()
    ]
    source = f"`{content['command']}`; {content['machine']}; {content['versions']}."
    return f"{content['about']}\n\n{markdown([title, *columns], rows)}\n\n{source}"


def soak() -> str:
    """What `make soak` did to fits, and how they ended."""
    seen = json.loads((results.FOLDER / "soak.json").read_text())["seen"]
    return markdown(["event", "count"], [[name, str(count)] for name, count in seen.items()])


def kills() -> str:
    """How often `python -m tests.kills` killed each command."""
    seen = json.loads((results.FOLDER / "kills.json").read_text())["kills"]
    return markdown(["command", "kills"], [[f"`{name}`", str(count)] for name, count in seen.items()])


def families() -> str:
    """What each family of models said on its way from files to files."""
    rows = json.loads((results.FOLDER / "families.json").read_text())
    cells = [
        [name, *(row[key] for key in ("inspect", "merge", "fit", "reason"))] for name, row in rows.items()
    ]
    return markdown(["family", "inspect", "merge", "fit", "reason"], cells)


def gradients() -> str:
    """The largest relative error of a tensor's gradient in each family, by what its experts change."""
    rows = json.loads((results.FOLDER / "gradients.json").read_text())
    columns = {
        "full": "full experts", "linear": "LoRA of linear layers", "embeddings": "LoRA of embeddings",
        "low-rank": "LoRA of all", "low-rank, recomputed": "the same, recomputed", "mixed": "LoRA and full",
    }  # fmt: skip
    cells = [
        [name, *("" if row[key] is None else f"{row[key]:.0e}" for key in columns), str(row["tapped"])]
        for name, row in rows.items()
    ]
    return markdown(["family", *columns.values(), "taken at their layer"], cells)


def cases() -> str:
    """What each script of `make cases` said."""
    rows = json.loads((results.FOLDER / "cases.json").read_text())
    return markdown(
        ["script", "answer", "reason"],
        [[f"`{name}`", row["answer"], row["why"]] for name, row in rows.items()],
    )


def fuzz() -> str:
    """How many mutated files each door was tried with."""
    rows = json.loads((results.FOLDER / "fuzz.json").read_text())["doors"]
    return markdown(
        ["door", "mutated files", "were read", "no error of ours", "which"],
        [
            [name, *(f"{row[key]:,}" for key in ("inputs", "read", "others")), row["why"]]
            for name, row in rows.items()
        ],
    )


def gpu() -> str:
    """What `make gpu` found, if it has run: build/gpu.json, kept as tests/results/gpu.json."""
    file = results.FOLDER / "gpu.json"
    if not file.exists():
        return "**Not run on a GPU yet.** One command does all of it:"
    found = json.loads(file.read_text())
    rows = [
        [part, f"`{row['name']}`", "" if row["value"] is None else shown(row["value"]), row["unit"]]
        for part, own in found["parts"].items()
        for row in own["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    table = markdown(["part", "figure", "value", "of what"], rows)
    return f"{table}\n\n`make gpu`; {found['device']}, CUDA {found['cuda']}; {versions}."


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "guard": guard,
    "suite": lambda: suite.table(suite.measured()),
    "lm-suite": lambda: lm_suite.table(lm_suite.measured()),
    "lm-curve": lambda: lm_suite.curve(lm_suite.measured()),
    "lm-loss": lambda: lm_suite.losses(lm_suite.measured()),
    "embed-suite": lambda: embed_suite.table(embed_suite.measured()),
    "head-suite": head_suite.table,
    "closed-forms": closed_suite.table,
    "vision-suite": lambda: vision_suite.table(vision_suite.measured()),
    "vision-held-out": vision_starts.table,
    "recovered": held_out_scores.table,
    "judges": held_out_rows.table,
    "front": front,
    **{f"paper-{card}": (lambda card=card: paper.table(card)) for card in ("h100", "h200")},
    "soak": soak,
    "kills": kills,
    "families": families,
    "gradients": gradients,
    "cases": cases,
    "fuzz": fuzz,
    "survey": survey.table,
    "gpu": gpu,
    **{
        f"bench-{file.stem}": (lambda group=file.stem: figures(group))
        for file in sorted((results.FOLDER / "bench").glob("*.json"))
    },
    "bench-mergekit": lambda: by_method("mergekit", "method"),
    "bench-packed": lambda: by_method("packed", "`--codec` or `--budget`"),
    "bench-packed_suite": lambda: by_method("packed_suite", "`--codec` or `--budget`"),
}


def filled(text: str) -> str:
    """A page with every table of it made anew."""
    for name, table in TABLES.items():
        before, opened, rest = text.partition(f"<!-- {name} -->")
        _, closed, after = rest.partition(f"<!-- /{name} -->")
        if opened and closed:
            text = f"{before}{opened}\n{table()}\n{closed}{after}"
    return text


def main() -> None:
    """Write the tables into the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
