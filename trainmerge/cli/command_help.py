"""A command's help on one screen, from its signature and docstring, without further imports."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import Parameter, getdoc, signature
from typing import Any, get_args, get_origin

from trainmerge.cli.arguments import Options

INDENT = 22  # columns before an option's description


def command_help(command: Callable[..., None]) -> str:
    """Usage, summary, examples, and a line or two per argument."""
    about, _, arguments = (getdoc(command) or "").partition("\nArgs:\n")
    words = argument_words(arguments)
    lines = [f"usage: {usage(command)} [options]", "", about.strip(), ""]
    for name, parameter in signature(command).parameters.items():
        lines += _entry(_spelling(parameter), _default(parameter, words.get(name, "")))
    lines += _entry("--trust NAME", "Import this module if a run's files name classes of it.")
    return "\n".join(lines) + "\n"


def usage(command: Callable[..., None]) -> str:
    """`trainmerge export RUN OUT`."""
    return " ".join(["trainmerge", command.__name__, *(name.upper() for name in required(command))])


def required(command: Callable[..., None]) -> list[str]:
    """The parameters without a default: the positional words."""
    parameters = signature(command).parameters.items()
    return [name for name, parameter in parameters if parameter.default is Parameter.empty]


def check_words(
    command: Callable[..., None], positional: Sequence[str], given: Sequence[str], options: Options
) -> None:
    """Check that every option exists, and that there are as many positional words as the command needs.

    Raises:
        ValueError: another option, or missing or further words.
    """
    help_words = f"{usage(command)} (see trainmerge {command.__name__} --help)"
    for word in given:
        key = word[2:].partition("=")[0]
        if key not in options.known:
            near = get_close_matches(key, sorted(options.known), n=1)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
            raise ValueError(f"no option --{key.replace('_', '-')}{hint}\n{help_words}")
    names = required(command)
    if missing := names[len(positional) :]:
        are = "are" if len(missing) > 1 else "is"
        raise ValueError(f"{' and '.join(name.upper() for name in missing)} {are} missing: {help_words}")
    if names != ["paths"] and len(positional) > len(names):
        raise ValueError(f"{positional[len(names)]!r} is one word too many: {help_words}")


def argument_words(text: str) -> dict[str, str]:
    """Parameter -> its description, from a docstring's section of arguments."""
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(text).splitlines():
        if line[:1].strip():
            name, _, rest = line.partition(":")
            found[name] = rest.strip()
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found


def _spelling(parameter: Parameter) -> str:
    """`PATH`, `--dry-run`, `--no-compare`, `--limit N`, `--over experts|coefficients`."""
    if parameter.default is Parameter.empty:
        return parameter.name.upper()
    option = f"--{parameter.name.rstrip('_').replace('_', '-')}"
    if parameter.annotation is bool:
        return option.replace("--", "--no-") if parameter.default else option
    return f"{option} {_value(parameter.annotation)}"


def _value(kind: Any) -> str:
    """The placeholder of a value of this type."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    if parts and get_origin(kind) not in (list, dict):
        return "|".join(part if isinstance(part, str) else _value(part) for part in parts)
    names = {int: "N", float: "X", str: "TEXT"}
    return names.get(kind, "YAML")


def _default(parameter: Parameter, words: str) -> str:
    given = parameter.default
    plain = given is Parameter.empty or given is None or isinstance(given, bool)
    return words if plain else f"{words} [{given}]"


def _entry(spelling: str, words: str) -> list[str]:
    """The spelling and its description on one line, or on two if the spelling is long."""
    width = max(min(shutil.get_terminal_size((100, 40)).columns, 110), 60)
    wrapped = textwrap.wrap(words, width - INDENT)
    head = f"  {spelling}"
    if len(head) < INDENT - 1 and wrapped:
        return [f"{head:<{INDENT}}{wrapped[0]}", *(" " * INDENT + line for line in wrapped[1:])]
    return [head, *(" " * INDENT + line for line in wrapped)]
