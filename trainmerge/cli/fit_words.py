"""The command line of `trainmerge fit` -> the form that its parser accepts."""

from argparse import ArgumentParser
from collections.abc import Sequence

from trainmerge.cli.arguments import Options, split_words, takes_a_bool

NAMES = frozenset({"recipe.experts", "recipe.held_out"})  # mappings with user-chosen keys
FORMS = "write `trainmerge fit CONFIG RUN [options]`, or --config CONFIG --run RUN"


def fit_words(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """CONFIG and RUN as options, before all others, and every option in the parser's spelling.

    Raises:
        ValueError: more than two positional words, or some together with --config or --run.
    """
    positional, options = split_words(words, parser_options(parser))
    if not positional:
        return options
    if len(positional) > 2:
        raise ValueError(f"{positional[2]!r} is one word too many: {FORMS}")
    if both := [word for word in options if word.startswith(("--config=", "--run="))]:
        raise ValueError(f"{positional[0]!r} together with {both[0].partition('=')[0]}: {FORMS}")
    given = dict(zip(("config", "run"), positional, strict=False))
    return [*(f"--{key}={value}" for key, value in given.items()), *options]


def parser_options(parser: ArgumentParser) -> Options:
    """The kinds of the parser's options."""
    flags, mixed, valued, alone = set(), set(), set(), {"help", "print_config"}
    for action in parser._actions:
        names = {option[2:] for option in action.option_strings if option.startswith("--")}
        kind = getattr(action, "_typehint", action.type)
        if action.nargs == 0:
            alone |= names
        elif kind in (bool, bool | None):
            flags |= names
        elif takes_a_bool(kind):
            mixed |= names
        else:
            valued |= names
    valued -= alone
    return Options(
        frozenset(flags), frozenset(mixed), frozenset(valued), frozenset(alone), NAMES, short_options(parser)
    )


def short_options(parser: ArgumentParser) -> dict[str, str]:
    """Letter -> option."""
    found: dict[str, str] = {}
    for action in parser._actions:
        letters = [option[1:] for option in action.option_strings if not option.startswith("--")]
        words = [option[2:] for option in action.option_strings if option.startswith("--")]
        found |= {letter: words[0] for letter in letters if words}
    return found
