"""Base and experts side by side: every mismatch in one error, then task vectors over mapped files."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from trainmerge.checkpoints.low_rank_adapter import plan_adapter
from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.parameters import Parameters, fit_prefix, open_parameters
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.sources import FullSource, Source, Sources
from trainmerge.checkpoints.tokenizer_check import tokenizer_mismatches
from trainmerge.task_vectors.delta import TaskVectors

RESIZED = "resize both to one vocabulary, or set vocabulary=shared to merge the tokens that both have"


class FittingExpert(Protocol):
    """One expert that fits the base: where its numbers are, when that is asked for."""

    def sources(self) -> dict[str, Source]:
        """The base's tensor name -> where what the expert adds lies. Absent names are untouched."""
        ...


def open_task_vectors(
    base: Checkpoint,
    experts: Mapping[str, str | Path],
    *,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
    workspace: Path | None = None,
    shared_vocabulary: bool = False,
) -> TaskVectors:
    """Open full experts and peft adapters, mixed as they come, against one base. Tensors stay on disk.

    Arguments and errors are those of `find_sources`.
    """
    found = find_sources(
        base,
        experts,
        ignore=ignore,
        allow_pickle=allow_pickle,
        workspace=workspace,
        shared_vocabulary=shared_vocabulary,
    )
    return found.open(base)


def find_sources(
    base: Checkpoint,
    experts: Mapping[str, str | Path],
    *,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
    workspace: Path | None = None,
    shared_vocabulary: bool = False,
) -> Sources:
    """Compare full experts and peft adapters, mixed as they come, with one base.

    Args:
        base: The checkpoint that every expert was fine-tuned from.
        experts: Name -> folder.
        ignore: fnmatch patterns of tensors to leave as the base has them; an expert's own head, say.
        allow_pickle: Read `.bin` files too.
        shared_vocabulary: Merge the tokens that both have, where an expert has more or fewer than the base.
        workspace: Where adapters that are not plain low-rank updates are written as merged weights.

    Raises:
        ValueError: everything that does not fit, of all experts at once, before a weight is read; after
            that, an expert whose tied tensors differ, or an adapter that peft cannot merge.
    """
    frame = open_parameters(base, ignore)
    plans: dict[str, FittingExpert] = {}
    problems: list[str] = []
    for expert, folder in experts.items():
        path = Path(folder)
        try:
            if (path / "adapter_config.json").is_file():
                plans[expert] = plan_adapter(frame, path, ignore, allow_pickle, workspace)
            else:
                plans[expert] = _plan_full(frame, expert, path, ignore, allow_pickle, shared_vocabulary)
            problems += [f"{expert}: {line}" for line in tokenizer_mismatches(base.path, path)]
        except (ValueError, FileNotFoundError) as error:
            problems += [f"{expert}: {line}" for line in str(error).splitlines()]
    _raise(base, problems)
    _check_ties(frame, plans)
    sources = {expert: plan.sources() for expert, plan in plans.items()}
    return Sources(tuple(frame.files.values()), frame.tied, sources)


def _check_ties(frame: Parameters, plans: Mapping[str, FittingExpert]) -> None:
    sides = {"base": frame} | {
        name: plan.parameters for name, plan in plans.items() if isinstance(plan, _Full)
    }
    _raise(frame.checkpoint, [f"{side}: {line}" for side, own in sides.items() for line in _untied(own)])


def _raise(base: Checkpoint, problems: Sequence[str]) -> None:
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} mismatches between the base {base.path} and its experts:\n{lines}")


def _untied(parameters: Parameters) -> list[str]:
    """Tensors that config.json ties and the files hold twice, with different values."""
    read = parameters.checkpoint.read
    return [
        f"{parameters.checkpoint.path}: {name} and {other} differ, config.json ties them; set "
        "tie_word_embeddings to false in base and experts, or save the model again"
        for name, others in parameters.duplicates().items()
        for other in others
        if not torch.equal(read(name), read(other))
    ]


@dataclass(frozen=True)
class _Full:
    parameters: Parameters
    names: Mapping[str, str]  # the base's tensor -> the expert's

    def sources(self) -> dict[str, Source]:
        tensors = self.parameters.checkpoint.tensors
        return {name: FullSource(str(tensors[own].file), own) for name, own in self.names.items()}


def _plan_full(
    frame: Parameters,
    expert: str,
    path: Path,
    ignore: Sequence[str],
    allow_pickle: bool,
    shared_vocabulary: bool,
) -> FittingExpert:
    """A full fine-tuned model against the base, headers only. Raises ValueError, one line a mismatch."""
    checkpoint = open_checkpoint(path, allow_pickle)
    base = frame.checkpoint
    problems = [
        f"{path}: {key} is {theirs!r}, the base has {ours!r}: not a fine-tuned copy of this base; {remedy}"
        for key, remedy in [("model_type", "leave it out"), ("vocab_size", RESIZED)]
        if not (key == "vocab_size" and shared_vocabulary)
        if (theirs := _setting(checkpoint, key)) != (ours := _setting(base, key))
    ]
    if any("model_type" in problem for problem in problems):  # nothing below would fit
        raise ValueError("\n".join(problems))
    own = open_parameters(checkpoint, ignore)
    fitted = _fitted(own, frame)
    names = {
        name: own.files[fitted[key]] for key, name in frame.files.items() if fitted.get(key) in own.files
    }
    sizes = _setting(checkpoint, "vocab_size"), _setting(base, "vocab_size")
    for name, theirs in names.items():
        shape, want = tuple(checkpoint.tensors[theirs].shape), tuple(base.tensors[name].shape)
        resized = (shape[0], want[0]) == sizes and shape[1:] == want[1:] if shape and want else False
        if shape != want and not (resized and shared_vocabulary):
            problems.append(
                f"{theirs} is {shape}, the base's {name} is {want}; exclude it with ignore=['{name}']"
            )
    problems += _ties(own, frame, fitted)
    tied = {*frame.skeleton.all_tied_weights_keys, *own.skeleton.all_tied_weights_keys}
    known = {*frame.names.values(), *tied}  # the ignored ones too
    extra = [own.files[name] for key, name in fitted.items() if key not in known and name in own.files]
    missing = [name for key, name in frame.files.items() if key not in fitted and key not in tied]
    problems += _groups(checkpoint, extra, names.values(), "which the base lacks")
    problems += _groups(base, missing, names, "which the expert lacks")
    if problems:
        raise ValueError("\n".join(problems))
    _warn_of_dtypes(expert, checkpoint, base, names)
    return _Full(own, names)


def _setting(checkpoint: Checkpoint, key: str) -> object:
    """A field of config.json, or of its text model's."""
    config = checkpoint.config
    return config.get(key, (config.get("text_config") or {}).get(key))


def _fitted(own: Parameters, frame: Parameters) -> dict[str, str]:
    """The base's parameter name -> the expert's, where only the prefix of the headless model may differ."""
    prefixes = {frame.skeleton.base_model_prefix, own.skeleton.base_model_prefix}
    fits = fit_prefix(own.names.values(), frame.names.values(), sorted(prefixes))
    return {theirs: name for name, theirs in fits.items()}


def _ties(own: Parameters, frame: Parameters, fitted: Mapping[str, str]) -> list[str]:
    """Parameters that are tied on one side and stand alone on the other."""
    remedy = "set tie_word_embeddings alike and save again, or exclude it with ignore"
    ours, theirs = frame.skeleton.all_tied_weights_keys, own.skeleton.all_tied_weights_keys
    problems = [
        f"{own.files[fitted[key]]} {tuple(own.checkpoint.tensors[own.files[fitted[key]]].shape)} is untied, "
        f"the base ties it to {ours[key]}; {remedy}"
        for key in fitted
        if key in ours and key not in frame.files and fitted[key] in own.files
    ]
    return problems + [
        f"{name} {tuple(frame.checkpoint.tensors[name].shape)} is untied in the base, the expert ties it to "
        f"{theirs[key]}; {remedy}"
        for key, name in frame.files.items()
        if key in theirs and key not in fitted
    ]


def _groups(checkpoint: Checkpoint, names: Iterable[str], common: Iterable[str], what: str) -> list[str]:
    """One line for each pattern that would cover tensors which only one side has."""
    common = list(common)
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        heads = [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]
        free = [head + "*" for head in heads if not any(other.startswith(head) for other in common)]
        tensor = f"{name} {tuple(checkpoint.tensors[name].shape)}"
        groups.setdefault((free or [name])[0], []).append(tensor)
    return [
        f"{checkpoint.path} has {shorten(tensors)}, {what}; if it stays with its task, exclude it with "
        f"ignore=['{pattern}']"
        for pattern, tensors in groups.items()
    ]


def _warn_of_dtypes(expert: str, checkpoint: Checkpoint, base: Checkpoint, names: Mapping[str, str]) -> None:
    pairs = {
        (str(checkpoint.tensors[own].dtype), str(base.tensors[name].dtype)) for name, own in names.items()
    }
    mixed = ", ".join(f"{theirs} against {ours}" for theirs, ours in sorted(pairs) if theirs != ours)
    if mixed:
        message = (
            f"expert {expert} ({checkpoint.path}) and the base differ in dtype: {mixed}; differences are"
        )
        warnings.warn(f"{message} taken in float32", stacklevel=5)
