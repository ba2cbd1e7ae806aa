"""Which tensors of an expert are its own head, and never merged.

A head stands above the backbone: outside of it, or a child of it that the other side lacks as a whole (BERT's
pooler). Its parameters are the expert's own where the base lacks them or has them in another shape; all of
them, where the label sets differ.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from trainmerge.checkpoints.meta_model import architecture_of
from trainmerge.checkpoints.model_config import read_model_config
from trainmerge.checkpoints.output import Kind, output_of, output_of_class
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.weight_files import ADAPTER, read_folder_json

HEADS: tuple[Kind, ...] = ("classifier", "token classifier", "question-answering model")

# peft's task types, and the ending of their classes; by transformers' own names of their heads
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


class Labels(NamedTuple):
    """The meaning of a head's outputs, by config.json."""

    kind: Kind
    number: int | None
    problem: str | None
    names: tuple[str, ...] | None  # None: transformers' LABEL_0, LABEL_1, ...


def may_have_head(folder: Path) -> bool:
    """Whether an expert's folder says that it has a task's head: by its class, or its adapter's task."""
    if (folder / ADAPTER).is_file():
        return adapter_task(read_folder_json(folder / ADAPTER)) is not None
    return (folder / "config.json").is_file() and output_of(folder).kind in HEADS


def adapter_task(config: Mapping[str, Any]) -> str | None:
    """The task type of an adapter that has a head: as it says, or by the class that it was made for."""
    if (task := str(config.get("task_type"))) in TASKS:
        return task
    named = config.get("auto_mapping")
    made_for = str(named.get("base_model_class")) if isinstance(named, Mapping) else ""
    return next((task for task, ending in TASKS.items() if made_for.endswith(ending)), None)


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model's class has a task's head."""
    return output_of_class(type(model), model.config).kind in HEADS


def own_parameters(own: Parameters, frame: Parameters, fitted: Mapping[str, str], whole: bool) -> set[str]:
    """The parameters of a full expert that are its own head.

    Args:
        own: The expert's.
        frame: The base's.
        fitted: The base's parameter -> the expert's.
        whole: Whether the head is its own though the base has one of the same shapes.
    """
    if not has_head(own.meta_model):
        return set()
    there = {*frame.names.values(), *(frame.meta_model.all_tied_weights_keys or {})}
    whole_model = {name: p.shape for name, p in frame.meta_model.named_parameters()}
    shapes = {
        name: shape for name, shape in whole_model.items() if name in there
    }  # of a pooler, say, if saved
    ours = {theirs: base for base, theirs in fitted.items() if base in shapes}
    theirs = {name: p.shape for name, p in own.meta_model.named_parameters()}

    def is_own(name: str) -> bool:
        if name not in ours:
            return above(own.meta_model, name, ours)
        outside = not _below(own.meta_model, name)
        return outside and (whole or shapes[ours[name]] != theirs[name])

    return {name for name in own.files if is_own(name)}


def above(model: PreTrainedModel, name: str, common: Iterable[str]) -> bool:
    """Whether a parameter stands above the backbone; `common` are those that both sides have."""
    if not _below(model, name):
        return True
    start = _prefix(model)
    child = start + name.removeprefix(start).partition(".")[0] + "."
    return not any(other.startswith(child) for other in common)


def _below(model: PreTrainedModel, name: str) -> bool:
    return name.startswith(_prefix(model))


def _prefix(model: PreTrainedModel) -> str:
    """`bert.`, or empty if the model is the backbone itself."""
    name = model.base_model_prefix
    return f"{name}." if name and hasattr(model, name) else ""


def with_whole_heads(base: Path, experts: Mapping[str, Path], forced: Collection[str]) -> set[str]:
    """The experts whose whole head is their own, though the base may have one of the same shapes.

    Those that `forced` names, those whose labels differ in kind or number from the base's, and all of them if
    two sides name their labels differently. Folders that cannot be read are left out: the comparison of
    tensors names what is wrong.
    """
    found = dict(_readable({"": base, **experts}))
    ours = found.pop("", None)
    if ours is None:
        return set(forced)
    names = {side.names for side in (ours, *found.values()) if side.names is not None}
    if len(names) > 1:
        return {*forced, *experts}
    return {*forced, *(name for name, own in found.items() if _apart(ours, own))}


def _apart(one: Labels, other: Labels) -> bool:
    problems = {side.problem for side in (one, other) if side.problem is not None}
    return (one.kind, one.number) != (other.kind, other.number) or len(problems) > 1


def _readable(folders: Mapping[str, Path]) -> Iterator[tuple[str, Labels]]:
    for name, folder in folders.items():
        if (folder / ADAPTER).is_file() and name:
            continue  # an adapter names no labels
        try:
            config = read_model_config(folder)
            found = labels_of(architecture_of(config), config)
        except (ValueError, KeyError, OSError):
            continue
        if found is not None:
            yield name, found


def labels_of(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Labels | None:
    """The labels of a class and its configuration; None without a task's head."""
    output = output_of_class(kind, config)
    if output.kind not in HEADS:
        return None
    told: Any = config.id2label or {}
    names = tuple(str(told[i]) for i in sorted(told))
    plain = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    return Labels(output.kind, config.num_labels, config.problem_type, None if plain else names)
