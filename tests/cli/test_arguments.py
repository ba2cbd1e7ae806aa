"""Words of the command line: bare flags, dashes and underscores, positionals anywhere, help on one screen."""

import os
import subprocess
import sys

import pytest

from trainmerge.cli.arguments import Options, options_of, split_words
from trainmerge.cli.commands import evaluate
from trainmerge.cli.export import export
from trainmerge.cli.fit_help import FIT_HELP
from trainmerge.cli.program import COMMANDS, main

OPTIONS = Options(
    flags=frozenset({"dry_run", "model.keep_better"}),
    mixed=frozenset({"trainer.deterministic"}),
    valued=frozenset({"save_every", "trainer.max_steps", "model.objective", "recipe.experts", "run"}),
    alone=frozenset({"help", "print_config"}),
    mappings=frozenset({"recipe.experts"}),
    short={"h": "help", "c": "config"},
)


@pytest.mark.parametrize(
    ("words", "positional", "options"),
    [
        ("a b", "a b", ""),
        ("--dry-run a b", "a b", "--dry_run=true"),
        ("a --dry_run false b", "a b", "--dry_run=false"),
        ("a --dry_run=False", "a", "--dry_run=False"),
        ("--no-dry-run", "", "--dry_run=false"),
        ("--model.keep-better --save-every 5", "", "--model.keep_better=true --save_every=5"),
        ("--trainer.max-steps=5", "", "--trainer.max_steps=5"),
        ("--trainer.deterministic warn", "", "--trainer.deterministic=warn"),
        ("--trainer.deterministic --save_every 5", "", "--trainer.deterministic=true --save_every=5"),
        ("--model.objective.at -1.5 x", "x", "--model.objective.at=-1.5"),
        ("--model.objective.couples --dry-run", "", "--model.objective.couples=true --dry_run=true"),
        ("--recipe.experts.my-own.no-such 2", "", "--recipe.experts.my-own.no_such=2"),
        ("--model.objective.my-part.my-name.x-y 2", "", "--model.objective.my_part.my-name.x-y=2"),
        ("--model.objective.init_args.my-part.a-x=2", "", "--model.objective.init_args.my_part.a-x=2"),
        ("-h", "", "--help"),
        ("-c x.yaml --print-config", "", "--config=x.yaml --print_config"),
        ("--run", "", "--run"),  # the parser says what is missing
        ("--dry-run -- --odd", "--odd", "--dry_run=true"),
    ],
)
def test_split_words(words: str, positional: str, options: str) -> None:
    assert split_words(words.split(), OPTIONS) == (positional.split(), options.split())


def test_options_of_a_command() -> None:
    assert options_of(export).flags == {"overwrite", "verify", "mergekit", "embeddings", "router"}
    assert options_of(evaluate).flags == {"compare", "controls", "fresh"}
    assert {"limit", "max_length", "output", "recipe"} < options_of(evaluate).valued


def test_an_option_may_be_a_word_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    """`--as` is the parameter `as_`."""
    assert split_words(["r", "o", "--as", "adapter"], options_of(export))[1] == ["--as_=adapter"]
    assert main(["export", "--help"]) == 0
    assert "--as checkpoint|adapter|adapters" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fit"])
def test_help_is_a_screen_and_names_every_argument(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: trainmerge {name} ")
    assert len(text.splitlines()) <= 40
    entries = [line for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    arguments = COMMANDS[name].args[0].__code__.co_argcount  # type: ignore[attr-defined]
    assert len(entries) == arguments + 1  # and --trust, which all commands have


def test_help_of_fit_is_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert capsys.readouterr().out == FIT_HELP
    assert len(FIT_HELP.splitlines()) <= 40
    assert max(map(len, FIT_HELP.splitlines())) <= 80
    with pytest.raises(SystemExit):
        main(["fit", "--help-all"])
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_no_help_imports_anything_heavy() -> None:
    code = (
        "import sys, trainmerge.cli.program as cli\n"
        "[cli.main([name, '--help']) for name in cli.COMMANDS]\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'jsonargparse', 'pytorch_lightning')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
