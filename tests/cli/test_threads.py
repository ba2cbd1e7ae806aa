"""A fit that goes on computes with the threads that its run began with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import write_config
from tests.world import write_world
from trainmerge.cli.threads import run_of, threads_of
from trainmerge.system.threads import USERS

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    "words",
    [
        "c.yaml runs/a --trainer.max-steps 5",
        "--dry-run c.yaml runs/a",
        "--save-every 5 c.yaml runs/a --model.keep_better",
        "--config c.yaml --run runs/a",
        "--run=runs/a --config=c.yaml",
        "runs/a/config.yaml --no-report",
        "--config runs/a/config.yaml",
    ],
)
def test_the_run_of_a_command(words: str) -> None:
    assert run_of(words.split()) == Path("runs/a")


def test_no_run() -> None:
    assert run_of([]) is None
    assert threads_of(None) is None


def test_threads_of_a_run(tmp_path: Path) -> None:
    assert threads_of(tmp_path) is None
    deep = "[" * 100_000
    for text, threads in (
        ('{"started": {"threads": 3}}', 3),
        ('{"started": {}}', None),
        ("{", None),
        (deep, None),
    ):
        (tmp_path / "manifest.json").write_text(text)
        assert threads_of(tmp_path) == threads


def test_a_fit_goes_on_with_the_threads_it_began_with(tmp_path: Path) -> None:
    write_world(tmp_path)
    run, free = tmp_path / "run", {name: value for name, value in os.environ.items() if name not in USERS}

    def fit(steps: int, **variables: str) -> str:
        words = ["fit", str(write_config(tmp_path)), str(run), "--trainer.max-steps", str(steps)]
        command = [sys.executable, "-m", "trainmerge.cli", *words]
        return subprocess.run(
            command, env={**free, **variables}, capture_output=True, text=True, check=True
        ).stderr

    fit(1, OMP_NUM_THREADS="1")
    assert json.loads((run / "manifest.json").read_text())["started"]["threads"] == 1
    assert fit(2).startswith("trainmerge: 1 thread: ")
    assert "the run had 1, so the last bits may differ" in fit(3, OMP_NUM_THREADS="2")
    assert [json.loads(line)["threads"] for line in (run / "usage.jsonl").read_text().splitlines()] == [
        1,
        1,
        2,
    ]
