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


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("export a b --verfy", "no option --verfy; did you mean --verify?"),
        ("export a", "OUT is missing: trainmerge export RUN OUT"),
        ("export", "RUN and OUT are missing"),
        ("export a b c", "'c' is one word too many"),
        ("export a b --workers two", "workers must be an integer, not 'two'"),
        ("inspect a --weights maybe", "weights must be one of auto, yes, no, not 'maybe'"),
        ("compare", "PATHS is missing"),
    ],
)
def test_a_command_names_its_own_words(words: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 1
    assert answer in capsys.readouterr().err


def test_a_misspelt_key_is_found_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path)
    config = write_config(tmp_path)
    text = config.read_text()
    line = text[: text.index("max_steps")].count("\n") + 1
    for wrong, answer in [
        (text.replace("max_steps:", "max_stepz:"), f"{config}:{line}: no key 'trainer.max_stepz'"),
        (text.replace("max_steps:", "max_stepz:"), "did you mean 'trainer.max_steps'?"),
        (text.replace("model:", "modle:"), "no key 'modle'; did you mean 'model'?"),
        (
            text.replace("max_steps: ", "max_steps: a"),
            f"{config}:{line}: trainer.max_steps must be an integer",
        ),
    ]:
        config.write_text(wrong)
        assert main(["fit", str(config), str(tmp_path / "run")]) == 1
        assert answer in capsys.readouterr().err
    config.write_text(text)
    assert main(["fit", str(config), str(tmp_path / "run"), "--trainer.max-step", "2"]) == 1
    assert "no key 'trainer.max_step'; did you mean 'trainer.max_steps'?" in capsys.readouterr().err
    assert main(["fit", str(config)]) == 1
    assert "run is missing: trainmerge fit CONFIG RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("evaluate", "not a run folder, exported checkpoint or configuration file"),
        ("inspect", "a configuration must be a mapping with a section `recipe`, not 'a b c"),
        ("export", "not a run folder"),
    ],
)
def test_a_file_that_is_nothing_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, answer: str
) -> None:
    file = tmp_path / "notes"
    file.write_text("a b c " * 1000)
    assert main([command, str(file), *[str(tmp_path / "out")] * (command == "export")]) == 1
    said = capsys.readouterr().err
    assert f"{file}: {answer}" in said
    assert len(said) < 400


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
