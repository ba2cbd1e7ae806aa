"""The table of every system of the survey: what a row names is there, and its command is one of ours."""

import shlex
from inspect import isabstract
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import trainmerge as tm
from tests.survey import System, parts
from trainmerge.cli.arguments import options_of, split_words
from trainmerge.cli.command_help import check_words
from trainmerge.cli.fit import CommandLine
from trainmerge.cli.fit_words import fit_words
from trainmerge.cli.program import PLAIN
from trainmerge.fitting.from_config import build_settings

SYSTEMS = [system for own in parts().values() for system in own]
COMMANDS = sorted({system.command for system in SYSTEMS if system.command})
CONFIG = "configs/demo.yaml"


class ParserOnly(CommandLine):
    """Stops before anything is built."""

    def parse_arguments(self, parser: ArgumentParser, args: object) -> None:
        del args
        raise Parsed(parser)


class Parsed(Exception):
    """The parser of `trainmerge fit`."""


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    with pytest.raises(Parsed) as found:
        build_settings([], ParserOnly)
    made: ArgumentParser = found.value.args[0]
    made.exit_on_error = False
    return made


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_a_row_names_is_there(system: System) -> None:
    assert system.what or system.why
    assert bool(system.what) == bool(system.test)  # what is here has a test
    assert not system.what or system.classes or system.command
    for name in system.classes:
        assert name in tm.__all__
    if system.test:
        assert Path(system.test).is_file()


def test_every_system_is_named_once_and_every_method_somewhere() -> None:
    names = [system.name for system in SYSTEMS]
    assert len(names) == len(set(names))
    public = {getattr(tm, name) for name in tm.__all__}
    kinds = {c for c in public if isinstance(c, type) and issubclass(c, tm.Preprocess) and not isabstract(c)}
    rows = {name for system in SYSTEMS for name in system.classes}
    assert [kind.__name__ for kind in kinds if kind.__name__ not in rows] == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("fit ")])
def test_a_fit_is_parsed(command: str, parser: ArgumentParser) -> None:
    config, *words = shlex.split(command)[1:]
    given = fit_words(parser, [CONFIG if config == "CONFIG" else config, *words])
    assert parser.parse_args(given).run == "RUN"


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("fit ")])
def test_other_commands_have_these_words_and_options(command: str) -> None:
    name, *words = shlex.split(command)
    (function,) = [own for own in PLAIN if own.__name__ == name]
    options = options_of(function)
    check_words(function, *split_words(words, options), options)
