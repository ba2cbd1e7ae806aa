"""Ctrl-C: one line, exit code 130, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_cli import write_config
from tests.world import write_world
from trainmerge.cli import main
from trainmerge.cli import program as cli

pytestmark = pytest.mark.long

WAIT = 300.0  # seconds, and no test waits for them unless something hangs


def started(*words: str) -> subprocess.Popen[str]:
    """The command, in a process whose Ctrl-C is not ignored."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from trainmerge.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def test_a_fit_saves_and_goes_on(tmp_path: Path) -> None:
    write_world(tmp_path)
    words = ["fit", str(write_config(tmp_path)), str(tmp_path / "run"), "--trainer.max_steps"]
    process = started(*words, "100000")
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + WAIT
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=WAIT)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("trainmerge fit: ")]
    assert "the same command again to resume" in line
    steps = len(metrics.read_text().splitlines())
    assert f"stopped after step {steps};" in line
    assert main([*words, str(steps + 1)]) == 0
    assert [json.loads(row)["step"] for row in metrics.read_text().splitlines()] == list(range(steps + 1))


@pytest.mark.parametrize(("name", "ends"), [("export", "starts over"), ("search", "resumes")])
def test_any_command_ends_in_one_line(
    name: str, ends: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, name, interrupted)
    assert main([name]) == 130
    assert capsys.readouterr().err == f"trainmerge {name}: stopped; the same command {ends}\n"
