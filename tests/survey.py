"""The page of every system of the survey, from `tests/survey.toml`."""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from tests import results
from tests.closed_methods import METHODS
from tests.closed_suite import SUITES

FILE = Path(__file__).with_name("survey.toml")


@dataclass(frozen=True)
class System:
    """One row; see the file's first lines."""

    name: str
    source: str
    what: str = ""
    closed: str = ""
    command: str = ""
    test: str = ""
    figure: str = ""
    why: str = ""
    names: tuple[str, ...] = field(default=())

    @property
    def classes(self) -> tuple[str, ...]:
        """The public names that the row stands for."""
        steps = METHODS[self.closed].steps if self.closed else ()
        return (*self.names, *(name for name, _ in steps))

    @property
    def cells(self) -> list[str]:
        """What of it is here, the command, the test and the figure."""
        here = "; ".join(words for words in (self.what, self.why) if words)
        names = "" if self.closed else ", ".join(f"`{name}`" for name in self.names)
        command = f"`trainmerge {self.command}`" if self.command else names
        if self.closed:
            command = settings(self.closed)
        test = f"`{self.test.removeprefix('tests/')}`" if self.test else ""
        return [f"{self.name} ({self.source})", here, command, test, self._figure()]

    def _figure(self) -> str:
        if not self.closed:
            return self.figure
        found = results.measured(f"closed/text-{self.closed}")
        if found is not None:
            return f"{found['score']:.3f}"
        rows = json.loads((results.FOLDER / "bench/closed_demo.json").read_text())["figures"]
        own = [row["value"] for row in rows if row["name"] == self.closed]
        return f"{own[0]:.3f} ([demo](benchmarks.md#closed-forms-on-the-demo))" if own else "not run"


def settings(closed: str) -> str:
    """A closed form's settings, in few words."""
    method = METHODS[closed]
    steps = ", ".join(f"{name}({_given(given)})" for name, given in method.steps)
    learned = "" if "--trainer.max_steps=0" in method.options else ", learned from there"
    return f"`preprocess`: `{steps}`, `initial`: {method.coefficient:g}{learned}"


def _given(given: dict[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items())


def parts() -> dict[str, list[System]]:
    """Title -> the systems under it."""
    content = tomllib.loads(FILE.read_text())["part"]
    rows = {part["title"]: part["system"] for part in content}
    return {
        title: [System(**{**row, "names": tuple(row.get("names", ()))}) for row in own]
        for title, own in rows.items()
    }


def table() -> str:
    """Markdown: a section per part, a row per system."""
    head = (
        "| system | what of it is here; what is not | command or settings | test | figure |\n"
        + "|---" * 5
        + "|"
    )
    sections = [
        "\n".join([f"## {title}\n", head, *(f"| {' | '.join(system.cells)} |" for system in own)])
        for title, own in parts().items()
    ]
    return "\n\n".join([_baselines(), *sections])


def _baselines() -> str:
    scores = SUITES["text"].baselines()
    arithmetic = next(own["mean"] for name, own in scores.items() if name.startswith("task arithmetic"))
    return (
        "Figures without a link are mean accuracies on the text suite, where the experts have "
        f"{scores['expert']['mean']:.3f} and the best task arithmetic {arithmetic:.3f}. Where the demo is "
        "named, they are on fewer texts of its five adapters."
    )
