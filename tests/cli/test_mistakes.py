"""What a newcomer types by mistake is refused in words that help."""

from pathlib import Path

import pytest

from tests.cli.test_cli import write_config
from tests.world import write_world
from trainmerge.cli import main


def test_fit_without_words_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 1
    assert "CONFIG and RUN are missing" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--trainer.max_step", "--resum", "--model.keep_bette"])
def test_no_option_is_an_abbreviation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    write_world(tmp_path)
    config = str(write_config(tmp_path))
    assert main(["fit", config, str(tmp_path / "run"), f"{option}=1"]) == 1
    assert option.removeprefix("--").rpartition(".")[2] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_inspect_ends_with_an_error_where_a_fit_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    config = str(write_config(tmp_path))
    (tmp_path / "mood" / "calibration.jsonl").write_text('{"sentence": "red"}\n')
    assert main(["inspect", config]) == 1
    shown = capsys.readouterr()
    assert "no column" in shown.out
    assert "1 error, listed above" in shown.err


def test_a_resumed_fit_names_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path)
    config, run = str(write_config(tmp_path)), str(tmp_path / "run")
    assert main(["fit", config, run, "--no-report", "--trainer.max-steps", "2"]) == 0
    assert "resuming" not in capsys.readouterr().out
    assert main(["fit", config, run, "--no-report", "--trainer.max-steps", "3"]) == 0
    assert "resuming after step 2" in capsys.readouterr().out
