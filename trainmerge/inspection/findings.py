"""What headers and texts say of a recipe, before a weight is read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainmerge.checkpoints import open_checkpoint
from trainmerge.data.examples import load_examples
from trainmerge.run.recipe import Opened, Recipe
from trainmerge.system.text import listed
from trainmerge.task_vectors.parameter_names import matches

FEW = 8  # examples


@dataclass(frozen=True)
class Finding:
    """One thing to know; an `error` stops a fit."""

    level: Literal["note", "warning", "error"]
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Texts:
    """Expert -> its examples, as far as they can be read, by what a fit takes of them."""

    calibration: Mapping[str, list[str]]
    findings: tuple[Finding, ...]


def header_findings(recipe: Recipe, opened: Opened) -> Iterator[Finding]:
    """Tensors that no expert changes, that stay with their task, and differing chat templates."""
    untouched = [name for name in opened.base.tensors if name not in opened.task_vectors.deltas]
    tied = [name for name in untouched if name in opened.base.tied]
    untouched = [name for name in untouched if name not in tied]
    if untouched:
        yield Finding("note", f"no expert changes {listed(untouched)}: they keep the base's values")
    for name, expert in recipe.experts.items():
        own = _own_tensors(Path(expert.path), recipe)
        if own:
            yield Finding(
                "note",
                f"{name}: {listed(own)} are not in the base, so they were trained from scratch: ignored, "
                "they stay with their task",
                "" if expert.head else "give the task a `head` that reads them, if it needs one to be scored",
            )
        ours, theirs = _template(Path(recipe.base)), _template(Path(expert.path))
        if theirs and theirs != ours:
            yield Finding(
                "warning",
                f"{name}: its chat template is not the base's, which is the one that is used and exported",
                "render its chats yourself into a column of texts, if it was trained with its own template",
            )
    if len({expert.head is None for expert in recipe.experts.values()}) > 1:
        yield Finding("warning", "some experts have a head and some have none", "score them in two recipes")


def _own_tensors(folder: Path, recipe: Recipe) -> list[str]:
    """Tensors of a full expert that are left to it by `ignore` and that the base has not."""
    if (folder / "adapter_config.json").is_file():
        return []
    theirs = open_checkpoint(folder, recipe.allow_pickle).tensors
    ours = open_checkpoint(recipe.base, recipe.allow_pickle).tensors
    return [name for name in theirs if name not in ours and matches(name, recipe.ignore)]


def _template(folder: Path) -> str:
    """A folder's chat template; empty if it has none."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return ""
    try:
        return str(json.loads(settings.read_text(encoding="utf-8")).get("chat_template") or "")
    except ValueError:  # damaged: whoever loads the tokenizer says so
        return ""


def read_texts(recipe: Recipe, column: str = "text") -> Texts:
    """The calibration texts, and what is wrong with them: absent, few, the same twice, or in the test set."""
    found: list[Finding] = []
    texts: dict[str, list[str]] = {}
    for name, expert in recipe.experts.items():
        if not expert.calibration:
            remedy = "name its `calibration`, or merge in closed form (trainer.max_steps 0)"
            found.append(Finding("error", f"{name}: no calibration examples to learn from", remedy))
            continue
        try:
            texts[name] = list(load_examples(expert.calibration, [column])[column])
            test = set(load_examples(expert.test, [column])[column]) if expert.test else set()
        except ValueError as error:
            found.append(Finding("error", f"{name}: {error}"))
            continue
        if len(texts[name]) < FEW:
            found.append(Finding("warning", f"{name}: {len(texts[name])} calibration examples", "give more"))
        if shared := len(test & set(texts[name])):
            found.append(
                Finding(
                    "warning",
                    f"{name}: {shared} of {len(test)} test examples are calibration examples too",
                    "use a separate split, or its scores say how well they were memorised",
                )
            )
    firsts: dict[str, str] = {}
    for name, own in texts.items():
        twin = firsts.setdefault(json.dumps(own), name)
        if twin != name:
            found.append(Finding("warning", f"{twin} and {name} learn from the same examples"))
    return Texts(texts, tuple(found))
