"""What a run folder knows that a model card tells: steps, the last command, the optimizer, papers, scores."""

import ast
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from trainmerge.export.public import REMOVED, SECRET_KEY, public
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.run.saved import scores_are_current
from trainmerge.run.scores import ACCURACY, PERPLEXITY
from trainmerge.run.trust import PACKAGE, class_paths
from trainmerge.system.json_file import read_json

# Ours; the words of other programs say nothing to a stranger.
PROGRAMS = re.compile(r"(.*[/\\])?(trainmerge(\.exe)?|trainmerge[/\\]cli[/\\]__main__\.py)")
PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
AGAIN = "Run `trainmerge evaluate` again."


def last_command(run: Mapping[str, Any]) -> str:
    """The run's last command of `trainmerge`, without places of this machine; empty for another program's."""
    started = run.get("resumed") or run.get("started") or {}
    try:
        words = shlex.split(str(started.get("command", "")))
    except ValueError:  # an unclosed quote: not written by us
        return ""
    if not words or not PROGRAMS.fullmatch(words[0]):
        return ""
    return shlex.join(["trainmerge", *_public_words(words[1:])])


def _public_words(words: list[str]) -> Iterator[str]:
    """Options as `--key=value` or `--key value`; the value of a secret's key is left out."""
    secret = False
    for word in words:
        key, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        named = bool(SECRET_KEY.search(re.split(r"[.\-]", key)[-1]))
        if key and equals:
            yield f"{key}={REMOVED if named else public(value)}"
        else:
            yield REMOVED if secret and not key else key or str(public(value))
        secret = named and not equals


def optimizer_settings(text: str) -> Any:
    r"""An optimizer as it prints itself -> its class path and arguments; other text on one line.

    >>> optimizer_settings("Adam (\nParameter Group 0\n    lr: 0.02\n    amsgrad: False\n)")
    {'class_path': 'torch.optim.Adam', 'init_args': {'lr': 0.02, 'amsgrad': False}}
    """
    found = re.fullmatch(r"(\w+) \(\nParameter Group 0\n(.*)\n\)", text, re.DOTALL)
    if found is None or "Parameter Group 1" in text:
        return " ".join(text.split())
    name = f"torch.optim.{found[1]}" if hasattr(torch.optim, found[1]) else found[1]
    pairs = (line.strip().partition(": ") for line in found[2].splitlines())
    return {"class_path": name, "init_args": {key: _value(value) for key, _, value in pairs}}


def _value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def fit_settings(run: Mapping[str, Any]) -> str:
    """The settings of the fit as YAML, for strangers."""
    settings = {key: run[key] for key in ("objective", "constraint", "data", "optimizer") if key in run}
    if isinstance(settings.get("optimizer"), str):
        settings["optimizer"] = optimizer_settings(settings["optimizer"])
    return yaml.safe_dump(public(settings), sort_keys=False, width=110)


def papers(recipe: Recipe, run: Mapping[str, Any], learned: bool) -> dict[str, list[str]]:
    """Method -> the arXiv numbers in the documentation of its class; of this package's classes only.

    Args:
        recipe: Its preprocessing is used by every merge.
        run: The run's manifest.
        learned: Whether steps were taken, so that objective and constraint were used too.
    """
    keys = ("initial", "objective", "constraint", "quantise") if learned else ("initial",)
    named = {path.rpartition(".")[2] for path in class_paths({key: run.get(key) for key in keys})}
    public_names = import_module(PACKAGE)
    classes = [type(method) for method in recipe.preprocess]
    classes += [getattr(public_names, name) for name in sorted(named) if name in public_names.__all__]
    found = {kind.__name__: _numbers(kind) for kind in classes if kind.__module__.startswith(f"{PACKAGE}.")}
    return {name: numbers for name, numbers in found.items() if numbers}


def _numbers(kind: type) -> list[str]:
    """arXiv numbers in a class's docstring; in its file's, if the class names none."""
    for text in (kind.__doc__, sys.modules[kind.__module__].__doc__):
        if numbers := PAPER.findall(text or ""):
            return list(dict.fromkeys(numbers))
    return []


def merge_scores(folder: RunFolder, recipe: Recipe) -> tuple[str, dict[str, float]] | None:
    """Metric and task -> score of the run's merge; None without an evaluation of these coefficients.

    Prints a line if there is one of earlier coefficients.

    Raises:
        ValueError: a damaged file of scores.
    """
    file = folder.path / "scores.json"
    if not file.is_file():
        return None
    content = read_json(file, AGAIN)
    if not scores_are_current(folder, content.get("learned"), file):
        print(f"{file}: scores of other coefficients, so the model card has none. {AGAIN}", flush=True)
        return None
    row = content.get("learned")
    own = {name: row.get(name) for name in recipe.experts} if isinstance(row, Mapping) else {}
    values = {task: value for task, value in own.items() if isinstance(value, float) and math.isfinite(value)}
    if not own or values.keys() != own.keys():
        return None
    heads = any(expert.head for expert in recipe.experts.values())
    metric = _metric(folder.path / "evaluation.json", heads)
    return (metric, values) if metric else None


def _metric(evaluation: Path, heads: bool) -> str | None:
    """The first measure that `evaluate` wrote, or by the heads; None where the tasks have several."""
    content = read_json(evaluation, AGAIN) if evaluation.is_file() else {}
    measures = (content.get("learned") or {}).get("measures") or {}
    names = {next(iter(own), "") for own in measures.values() if isinstance(own, Mapping)}
    if not names:
        return ACCURACY.name if heads else PERPLEXITY.name
    return str(names.pop()) if len(names) == 1 else None
