"""Choose a command's threads before torch is loaded, and print them; a resumed run gets its own number."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainmerge.cli.arguments import Options, split_words
from trainmerge.system.threads import ThreadChoice, choose_threads

FLAGS = ("dry_run", "report", "model.keep_better", "model.keep_gradients", "model.sharded")
FIRST = "0"  # the rank that prints


def set_threads(run: Path | None = None) -> ThreadChoice | None:
    """Choose and print the threads unless the user has set them; `run`: the folder that may be resumed."""
    earlier = threads_of(run)
    choice = choose_threads(earlier)
    prints = all(os.environ.get(name, FIRST) == FIRST for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not prints:
        pass
    elif choice is not None:
        print(f"trainmerge: {choice}", file=sys.stderr)
    elif earlier is not None and given.isdigit() and int(given) != earlier:
        print(
            f"trainmerge: OMP_NUM_THREADS is {given}; the run had {earlier}, so the last bits may differ",
            file=sys.stderr,
        )
    return choice


def run_of(words: Sequence[str]) -> Path | None:
    """The run folder in the words of a fit, as far as known before parsing."""
    positional, options = split_words(words, Options(flags=frozenset(FLAGS)))
    given = dict(word[2:].split("=", 1) for word in options if "=" in word)
    if "run" in given:
        return Path(given["run"])
    if len(positional) == 2:
        return Path(positional[1])
    config = positional[0] if positional else given.get("config")
    return Path(config).parent if config else None  # a run's own config.yaml


def threads_of(run: Path | None) -> int | None:
    """The threads per process with which a run began; None for a new one."""
    manifest = run / "manifest.json" if run is not None else None
    if manifest is None or not manifest.is_file():
        return None
    try:
        threads = json.loads(manifest.read_text())["started"]["threads"]
    except (ValueError, KeyError, TypeError, RecursionError):  # older, or damaged: the fit reports it
        return None
    return threads if isinstance(threads, int) else None
