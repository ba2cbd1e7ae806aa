"""Judged merges, one line each, so that nothing is judged twice.

Legend: `K` experts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from trainmerge.fitting.held_out import mean_share
from trainmerge.system.atomic import append_line, write_whole_bytes
from trainmerge.system.json_file import parse_json, read_bytes

Examples = Literal["held out", "learned from"]  # by which a merge is judged
HELD_OUT: Examples = "held out"
LEARNING: Examples = "learned from"
REMEDY = "Remove it: its merges are judged again."


@dataclass(frozen=True)
class Trial:
    """A merge and what it recovers of each expert on some of their examples."""

    start: str
    scales: tuple[float, ...]  # K, of the start's coefficients
    recovered: tuple[float, ...]  # K: 1 is the expert, 0 the base
    seconds: float = 0.0
    weights: tuple[float, ...] = ()  # K, of the tasks; empty if they are equal
    examples: Examples = HELD_OUT

    @property
    def mean(self) -> float:
        """Mean over the experts by their tasks' weights."""
        return mean_share(self.recovered, self.weights)

    @property
    def worst(self) -> float:
        """The least of the experts."""
        return min(self.recovered)


class TrialLog:
    """The trials of a file by what they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Trial] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = read_bytes(self.path, REMEDY).splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):  # a killed process's
            write_whole_bytes(self.path, b"".join(whole))
        for line in whole:
            content = parse_json(line, self.path, REMEDY)
            self.known[_key(content)] = trial_of(content, self.path)

    def add(self, key: str, trial: Trial) -> None:
        """Append a trial; it is on disk when this returns."""
        self.known[key] = trial
        append_line(self.path, json.dumps({"key": key, **asdict(trial)}), durable=True)


def _key(content: object) -> str:
    return str(content.get("key")) if isinstance(content, Mapping) else ""


def trial_of(content: object, path: Path) -> Trial:
    """A trial as a file has it.

    Raises:
        ValueError: it is none; names the file.
    """
    try:
        assert isinstance(content, Mapping)
        examples = content.get("examples", HELD_OUT)
        assert examples in get_args(Examples)
        return Trial(
            str(content["start"]),
            _numbers(content["scales"]),
            _numbers(content["recovered"]),
            float(content["seconds"]),
            _numbers(content.get("weights") or ()),
            examples,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged. {REMEDY}") from error


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
