"""Findings from headers and calibration texts, without reading a weight."""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from trainmerge.checkpoints import OwnHead, open_checkpoint, output_of
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Render, read_examples, subject
from trainmerge.data.generate import WRITERS, Generate, generate_problems
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.run.heads import task_heads, unusable_heads
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.sources import DEFAULT_LENGTH as LENGTH
from trainmerge.system.text import listed
from trainmerge.task_vectors.parameter_names import matches

FEW = 8  # examples


@dataclass(frozen=True)
class Finding:
    """One finding; an `error` stops a fit."""

    level: Literal["note", "warning", "error"]
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Texts:
    """Expert -> its calibration examples, by `subject`; unreadable files are left out.

    `unwritten` are the numbers of the texts that experts will write themselves.
    """

    calibration: Mapping[str, list[str]]
    findings: tuple[Finding, ...]
    unwritten: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Expert -> the number of its examples."""
        return {**{name: len(own) for name, own in self.calibration.items()}, **self.unwritten}


def unchanged_tensors(opened: Opened) -> Iterator[Finding]:
    """Tensors that no expert changes."""
    untouched = [name for name in opened.base.tensors if name not in opened.task_vectors.deltas]
    untouched = [name for name in untouched if name not in opened.base.tied]
    if untouched:
        yield Finding("note", f"no expert changes {listed(untouched)}: they keep the base's values")


def expert_findings(recipe: Recipe, opened: Opened) -> Iterator[Finding]:
    """Tensors of an expert only, own heads, differing chat templates, and heads of some experts."""
    folders = recipe.folders
    for name, expert in recipe.experts.items():
        own = _own_tensors(folders[name], recipe)
        if own:
            yield Finding(
                "note",
                f"{name}: {listed(own)} are not in the base, so they were trained from scratch and are not "
                "merged",
                "" if expert.head else "if they are the task's classifier, set the expert's `head`",
            )
        ours, theirs = _template(opened.base.path), _template(folders[name])
        if theirs and theirs != ours:
            what = "the base's" if opened.base.origin is None else "the merge's"
            yield Finding(
                "warning",
                f"{name}: its chat template differs from {what}, which is used and exported",
                f"set recipe.chat_template: {name} (with tokenizer: union, if its tokens are new); or "
                "render its chats with its own template into a column of texts",
            )
    for problem in unusable_heads(recipe):
        yield Finding("error", problem)
    heads = task_heads(recipe, opened)
    for name, head in heads.items():
        if isinstance(head, OwnHead):
            yield from _own_head(name, head)
    if len({head is None for head in heads.values()}) > 1:
        yield Finding(
            "warning", "only some experts have a head", "evaluate the two kinds in separate recipes"
        )


def _own_head(name: str, head: OwnHead) -> Iterator[Finding]:
    count = head.config.num_labels
    what = {
        "classes": f"{count} classes", "tokens": f"{count} labels of tokens", "spans": "answers",
        "labels": f"{count} independent labels", "values": "numbers",
    }  # fmt: skip
    yield Finding(
        "note",
        f"{name}: its head is its own, of a {head.kind.__name__} ({what[head.outputs]}): it is not merged",
        f"`trainmerge export RUN OUT --task {name}` writes it over the merge",
    )
    try:
        _ = head.padding
    except ValueError as error:
        yield Finding("error", f"{name}: {error}")


def _own_tensors(folder: Path, recipe: Recipe) -> list[str]:
    """Tensors of a full expert that match `ignore` and that the base lacks."""
    if (folder / "adapter_config.json").is_file():
        return []
    theirs = open_checkpoint(folder, recipe.allow_pickle).tensors
    ours = open_checkpoint(recipe.folders["base"], recipe.allow_pickle).tensors
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
    except ValueError:  # damaged: loading the tokenizer reports it
        return ""


def read_texts(
    recipe: Recipe,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    learning: bool = True,
    tokenizer_folder: str | None = None,
) -> Texts:
    """Problems of the calibration examples: none, few, shared by two experts, or in the test set.

    The files are read as a fit reads them: chats are rendered, and every value is checked. A merge without
    `learning` needs none. `tokenizer_folder` is the merge's; None is the base.
    """
    output = output_of(recipe.folders["base"])
    files = calibration_files(recipe)
    problems = generate_problems(files, output.kind, output.architecture, columns)
    found = [Finding("error", problem) for problem in problems]
    unwritten = {name: file.generate for name, file in files.items() if isinstance(file, Generate)}
    texts: dict[str, list[str]] = {}
    tokenizer = cache(
        lambda: Tokenizer(tokenizer_folder or recipe.base, LENGTH)
    )  # loaded for the first chat only
    for name, expert in recipe.experts.items():
        if not expert.calibration:
            if learning:
                remedy = "set its `calibration`, or use a closed-form merge (trainer.max_steps 0)"
                if output.kind == WRITERS:
                    remedy += "; {generate: 64} lets the expert write them"
                found.append(Finding("error", f"{name}: no calibration examples to learn from", remedy))
            continue
        if isinstance(expert.calibration, Generate):
            continue
        try:
            examples = read_examples(expert.calibration, columns, lambda chat: tokenizer().render(chat))
            texts[name] = [subject(example) for example in examples]
            test = _test_texts(expert.test, columns, lambda chat: tokenizer().render(chat))
        except (ValueError, OSError) as error:
            found.append(Finding("error", f"{name}: {error}"))
            continue
        if unreadable := tokenizer().media.problems(examples) if without_text(examples) else []:
            found.append(Finding("error", f"{name}: {expert.calibration}: {unreadable[0]}"))
        found += _of_texts(name, texts[name], test)
    firsts: dict[str, str] = {}
    for name, own in texts.items():
        twin = firsts.setdefault(json.dumps(own), name)
        if twin != name:
            found.append(Finding("warning", f"{twin} and {name} have the same calibration examples"))
    return Texts(texts, tuple(found), unwritten)


def _test_texts(file: str | None, columns: Columns, render: Render) -> set[str]:
    """The texts of a test file, whose spans and targets are not needed."""
    if file is None:
        return set()
    plain = replace(columns, spans=None, target=None)
    return {subject(e) for e in read_examples(file, plain, render, located=False)}


def _of_texts(name: str, texts: Sequence[str], test: Set[str]) -> Iterator[Finding]:
    if len(texts) < FEW:
        yield Finding("warning", f"{name}: {len(texts)} calibration examples", "use more")
    if shared := len(test & set(texts)):
        yield Finding(
            "warning",
            f"{name}: {shared} of {len(test)} test examples are also calibration examples",
            "use separate splits: scores on examples that were fitted are too high",
        )
