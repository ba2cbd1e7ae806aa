"""The log of judged merges: whole lines are kept, a killed process's half line is dropped."""

from pathlib import Path

import pytest

from trainmerge.auto.trials import Trial, TrialLog


def test_a_log_is_read_back(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl")
    trials = {f"key{i}": Trial("TIES", (0.5, i / 3), (0.1, -0.2), 1.5) for i in range(3)}
    for key, trial in trials.items():
        log.add(key, trial)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"key": "half", "sca')
    assert TrialLog(tmp_path / "trials.jsonl").known == trials
    TrialLog(tmp_path / "trials.jsonl").add("later", trials["key0"])
    assert len(TrialLog(tmp_path / "trials.jsonl").known) == 4
    assert trials["key1"].mean == pytest.approx(-0.05)
    assert trials["key1"].worst == -0.2


def test_the_mean_has_the_tasks_weights() -> None:
    assert Trial("s", (1.0,) * 3, (0.2, 0.4, -1.0), weights=(1.0, 3.0, 0.0)).mean == pytest.approx(0.35)


def test_a_log_in_no_unicode_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_bytes(b'{"key": "\xff"}\n')
    with pytest.raises(ValueError, match=r"trials\.jsonl.*Remove it"):
        TrialLog(tmp_path / "trials.jsonl")


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"key": "a", "start": "s", "scales": "x", "recovered": [1], "seconds": 1}', "no"]
)
def test_a_damaged_log_says_what_to_do(tmp_path: Path, line: str) -> None:
    (tmp_path / "trials.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"trials\.jsonl.*Remove it"):
        TrialLog(tmp_path / "trials.jsonl")
