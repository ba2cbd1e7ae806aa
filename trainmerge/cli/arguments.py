"""Command-line words -> the form that the parsers accept.

Flags need no value (`--verify`), dashes may replace underscores (`--dry-run`), and positional words may come
anywhere among the options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import get_args, get_origin

TRUTH = ("true", "false", "yes", "no")


@dataclass(frozen=True)
class Options:
    """A parser's options, without their dashes.

    Args:
        flags: Boolean options; `true` if no value follows.
        mixed: Options of a boolean or another type; any following word that is not an option is their value.
        valued: Options with one value.
        alone: Options without a value.
        mappings: Options whose keys are user-chosen names, in which dashes are not replaced.

    A key inside another option is a plug-in's parameter, in which dashes are replaced; deeper keys may be
    user-chosen names, so they stay as they are: `model.initial.metrics.my-own`.
    """

    flags: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
    valued: frozenset[str] = frozenset()
    alone: frozenset[str] = frozenset({"help"})
    mappings: frozenset[str] = frozenset()
    short: dict[str, str] = field(default_factory=lambda: {"h": "help"})

    @property
    def known(self) -> frozenset[str]:
        """All of them."""
        return self.flags | self.mixed | self.valued | self.alone

    def spelled(self, key: str) -> str:
        """The option of a user's spelling: `trainer.max-steps` is `trainer.max_steps`."""
        plain = key.replace("-", "_")
        if f"{plain}_" in self.known:  # a word of Python: --as is the parameter `as_`
            return f"{plain}_"
        if key in self.known or plain in self.known:
            return key if key in self.known else plain
        for mapping in self.mappings:
            if plain.startswith(f"{mapping}."):
                name, dot, rest = key[len(mapping) + 1 :].partition(".")
                return f"{mapping}.{name}{dot}{rest.replace('-', '_')}"
        outer = max((name for name in self.known if plain.startswith(f"{name}.")), key=len, default="")
        inner = key[len(outer) + 1 :].split(".") if outer else []
        plugin = 2 if inner[:1] == ["init_args"] else 1  # levels of the plug-in's own
        return ".".join([*plain.split(".")[: outer.count(".") + 1 + plugin], *inner[plugin:]])

    def within(self, key: str) -> bool:
        """Whether it is a key inside a known option, as `model.objective.agreement` in `model.objective`."""
        return any(key.startswith(f"{option}.") for option in self.known)


def options_of(command: Callable[..., None]) -> Options:
    """The options of a command that is a function: its parameters with defaults."""
    given = {
        name: parameter.annotation
        for name, parameter in signature(command).parameters.items()
        if parameter.default is not Parameter.empty
    }
    flags = frozenset(name for name, kind in given.items() if kind is bool)
    short = {"h": "help"} | ({"o": "out"} if "out" in given else {})
    return Options(flags=flags, valued=frozenset(given) - flags, short=short)


def takes_a_bool(kind: object) -> bool:
    """Whether a type is a union with bool in it."""
    return get_origin(kind) is not None and bool in get_args(kind)


def split_words(words: Sequence[str], options: Options) -> tuple[list[str], list[str]]:
    """The positional words, and the options, each as one word `--key=value`."""
    left = list(words)
    positional: list[str] = []
    found: list[str] = []
    while left:
        word = left.pop(0)
        if word == "--":
            return [*positional, *left], found
        if not is_option(word):
            positional.append(word)
            continue
        key, equals, value = word.lstrip("-").partition("=")
        key = options.short.get(key, key) if not word.startswith("--") else options.spelled(key)
        negated = key.removeprefix("no_")
        if equals or key in options.alone:
            found.append(f"--{key}{equals}{value}")
        elif key not in options.known and negated in options.flags | options.mixed:
            found.append(f"--{negated}=false")
        else:
            found.append(f"--{key}{_value(key, left, options)}")
    return positional, found


def is_option(word: str) -> bool:
    """Whether a word is an option, rather than a value: negative numbers are values."""
    return word.startswith("-") and len(word) > 1 and not (word[1].isdigit() or word[1] == ".")


def _value(key: str, left: list[str], options: Options) -> str:
    """`=value`, removed from the remaining words; empty if there is none."""
    follows = bool(left) and not is_option(left[0])
    if key in options.flags:
        return f"={left.pop(0)}" if follows and left[0].lower() in TRUTH else "=true"
    if follows:
        return f"={left.pop(0)}"
    inner = key not in options.known and options.within(
        key
    )  # a plug-in's option: its parser knows whether it is a flag
    return "=true" if key in options.mixed or inner else ""


def take_trusted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules of `--trust NAME`, which every command takes, and the other words.

    Raises:
        ValueError: `--trust` without a name.
    """
    modules: list[str] = []
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        option, equals, name = word.partition("=")
        if word == "--":
            return modules, [*others, word, *left]
        if option != "--trust":
            others.append(word)
            continue
        if not equals and (not left or is_option(left[0])):
            raise ValueError("--trust needs the name of a module: --trust my_package")
        modules += (name if equals else left.pop(0)).split(",")
    return modules, others
