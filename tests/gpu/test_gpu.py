"""`make gpu` without a GPU: each part runs on the CPU in tiny sizes, and a failure is an exit code."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import packages
from tests.gpu.setting import Row, Setting

SETTING = Setting(torch.device("cpu"), tiny=True)
QUICK = [part for part in command.PARTS if part not in ("memory", "fits")]  # whole fits: two of them below


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Lightning's level of logging stays as it was."""
    log = logging.getLogger("pytorch_lightning")
    level = log.level
    yield
    log.setLevel(level)


@pytest.mark.parametrize("part", QUICK)
def test_a_part_gives_rows(part: str) -> None:
    rows = list(command.rows_of(part, "cpu", True))
    assert rows
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(row["value"] is None or row["value"] >= 0 or "share" in row["name"] for row in rows)


def test_fits_are_the_cpus_and_the_memory_is_counted() -> None:
    from tests.gpu import fits, memory

    names = [row["name"] for row in (*fits.run(SETTING), *memory.run(SETTING))]
    assert names == ["fit_words_eager_from_cpu", "resume_words_eager_apart", "plan_over_measured_eager_tiny"]


def test_the_file_has_every_part_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(part: str, *_: object) -> Iterator[Row]:
        yield {"name": part, "value": 1.0, "unit": "case"}
        assert part != "ranks", "they differ"

    out = tmp_path / "new" / "gpu.json"
    monkeypatch.setattr(command, "rows_of", some)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    found = json.loads(out.read_text())
    assert list(found["parts"]) == list(command.PARTS)
    errors = {part: own["error"] for part, own in found["parts"].items() if own["error"]}
    assert errors.keys() == {"ranks"}
    assert errors["ranks"].startswith("AssertionError: they differ")
    assert found["parts"]["ranks"]["rows"]  # those before it
    assert capsys.readouterr().out.endswith("failed: ranks\n")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="no GPU here"):
        command.main()


def test_torch_is_never_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(packages, "pip", lambda *words: str(asked.append(words)))
    packages.fetch(tmp_path)
    (words,) = asked
    assert "--no-deps" in words
    assert any(word.startswith("transformers==") for word in words)
    assert not any(word.partition("==")[0] in packages.STAYS for word in words)
    monkeypatch.setattr(packages, "missing", lambda _: ["torch==2.13.0"])
    with pytest.raises(SystemExit, match=r"torch==2\.13\.0 or later"):
        packages.unpack(str(tmp_path))


def test_nothing_is_missing_where_the_tests_run(tmp_path: Path) -> None:
    assert packages.missing(str(tmp_path)) == []
