"""The command line. Heavy imports happen inside the command that needs them, so `--help` is quick."""

import json
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from trainmerge.cli.adapters import extract
from trainmerge.cli.arguments import options_of, split_words, take_trusted
from trainmerge.cli.auto import auto
from trainmerge.cli.command_help import check_words, command_help
from trainmerge.cli.commands import allocate, compare, evaluate, report
from trainmerge.cli.exchange import push, rebuild
from trainmerge.cli.export import export
from trainmerge.cli.inspect_and_plan import inspect, plan
from trainmerge.cli.merge import merge
from trainmerge.cli.mixtures import shrink
from trainmerge.cli.packed import unpack
from trainmerge.cli.threads import run_of, set_threads
from trainmerge.cli.tradeoffs import pareto, search
from trainmerge.fitting.mistakes import explain_mistake
from trainmerge.system.lost_threads import check_room, lost_threads
from trainmerge.system.memory import is_out_of_memory
from trainmerge.system.text import words_of

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
HELP, HELP_ALL = {"-h", "--help"}, {"--help-all", "--help_all"}
PLAIN = (
    allocate,
    auto,
    compare,
    evaluate,
    export,
    extract,
    inspect,
    merge,
    pareto,
    plan,
    push,
    rebuild,
    report,
    search,
    unpack,
    shrink,
)
RESUMABLE = ("auto", "fit", "merge", "search")  # commands that resume

USAGE = """usage: trainmerge COMMAND ...

Learn the coefficients of a model merge from unlabeled data.

commands:
  merge      all in one line:     trainmerge merge configs/demo.yaml merged/
             mergekit's files:    trainmerge merge mergekit.yml merged/
             models, no file:     trainmerge merge BASE EXPERT EXPERT --method ties -o merged/
  auto       choose how, and do: trainmerge auto configs/demo.yaml merged/
  fit        learn coefficients:  trainmerge fit configs/adamerging.yaml runs/first
             again, to resume:    trainmerge fit configs/adamerging.yaml runs/first
  allocate   allocate chunks:     trainmerge allocate runs/first chunks.json --budget 1.0
             for a second fit:    trainmerge fit ... --recipe.grouping.chunks chunks.json
  export     write the model:     trainmerge export runs/first merged/
             and read it again:   trainmerge export runs/first merged/ --verify
             as a LoRA:           trainmerge export runs/first adapter/ --as adapter --rank 16
             its experts packed:  trainmerge export runs/first packed/ --as packed --codec mask
  unpack     one packed expert:   trainmerge unpack packed/ movie movie/
  extract    a LoRA of a model:   trainmerge extract BASE EXPERT adapter/ --rank 16 --rest leave
  shrink     a mixture's experts: trainmerge shrink MIXTURE smaller/ --experts 96 --calibration t.jsonl
  push       to the hub:          trainmerge push merged/ org/name --dry-run
  rebuild    a merge again:       trainmerge rebuild merged/README.md again/
  evaluate   score it:            trainmerge evaluate runs/first
  compare    several, one table:  trainmerge compare runs/first merged/ --recipe runs/first
  report     figures and a page:  trainmerge report runs/first
  pareto     trade tasks off:     trainmerge pareto runs/first
             a point's model:     trainmerge pareto runs/first --export 3 --out merged/
  search     without gradients:   trainmerge search configs/adamerging.yaml runs/found --score accuracy
  inspect    before or after:     trainmerge inspect configs/adamerging.yaml
             a configuration:     trainmerge inspect configs/adamerging.yaml --suggest mine.yaml
  plan       memory and time:     trainmerge plan path/to/model 8 --devices 8 --device h100
             of a fit:            trainmerge fit ... --dry-run, and --memory 8GiB limits it

A run that names classes of your own modules: --trust my_package, with any command. The files of a run folder
or an export import nothing else, so that a stranger's can be opened.

trainmerge COMMAND --help lists a command's options; fit also takes --help-all and --print-config.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"trainmerge {version('trainmerge')}, torch {version('torch')}, Python {python_version()}")
        return 0
    name, words = given[0], given[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        print(
            f"trainmerge: no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            file=sys.stderr,
        )
        return 2
    return _run(name, words)


def _run(name: str, words: list[str]) -> int:
    """Run a command; errors that a user can cause are a line on stderr, any other is a bug's traceback."""
    try:
        check_room()
        modules, words = take_trusted(words)
        with lost_threads():
            if not modules:
                return COMMANDS[name](words)
            from trainmerge.run.trust import trusting

            with trusting(*modules):
                return COMMANDS[name](words)
    except KeyboardInterrupt:
        again = "resumes" if name in RESUMABLE else "starts over"
        print(f"trainmerge {name}: stopped; the same command {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, TypeError, OSError) as error:
        print(f"trainmerge {name}: {words_of(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        again = "resumes" if name in RESUMABLE else "starts over"
        way = "lower data.batch_size or data.max_length" if "CUDA" in str(error) else "raise the limit"
        full = f"memory is full ({str(error) or 'no more was given'}): close other programs, or {way}"
        print(f"trainmerge {name}: {full}; the same command {again}", file=sys.stderr)
        return 1


def _fit(words: list[str]) -> int:
    from trainmerge.cli.fit_help import FIT_HELP

    if HELP & set(words):
        print(FIT_HELP, end="")
        return 0
    every_key = bool(HELP_ALL & set(words))
    choice = None if every_key else set_threads(run_of(words))
    if not words:
        raise ValueError("CONFIG and RUN are missing: trainmerge fit CONFIG RUN (see trainmerge fit --help)")
    from trainmerge.cli.fit import fit_command

    return fit_command(["--help"] if every_key else words, choice)


def _plain(command: Callable[..., None], words: list[str]) -> int:
    """A command that is one function."""
    if (HELP | HELP_ALL) & set(words):
        print(command_help(command), end="")
        return 0
    options = options_of(command)
    positional, given = split_words(words, options)
    check_words(command, positional, given, options)
    set_threads(Path(positional[-1]) if command is search else None)
    from jsonargparse import ArgumentError, auto_cli

    if command in (compare, merge):
        positional = [json.dumps(positional)]  # jsonargparse parses it as a list
    try:
        auto_cli(
            command,
            args=[*positional, *given],
            prog=f"trainmerge {command.__name__}",
            as_positional=True,
            allow_abbrev=False,
            exit_on_error=False,
        )
    except ArgumentError as error:
        raise ValueError(explain_mistake(str(error), options.known)) from error
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "fit": _fit,
    **{command.__name__: partial(_plain, command) for command in PLAIN},
}

if __name__ == "__main__":
    sys.exit(main())
