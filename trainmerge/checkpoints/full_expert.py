"""A full fine-tuned model against the base: every mismatch, from headers only."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from trainmerge.checkpoints.choice import TokenizerChoice
from trainmerge.checkpoints.computed_positions import stored_as_computed
from trainmerge.checkpoints.config_check import configuration_mismatches, warn_of_generation
from trainmerge.checkpoints.head_parts import above, own_parameters
from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.parameters import Parameters, fit_prefix, open_parameters
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.sources import FullSource, Source
from trainmerge.checkpoints.ties import lost_ties, tie_mismatches
from trainmerge.system.plain_data import text_settings

RESIZED = (
    "resize both to one vocabulary, or set vocabulary=shared to merge the common tokens, or "
    "tokenizer=union to keep all of them"
)


@dataclass(frozen=True)
class FullExpert:
    """A full expert that matches the base."""

    parameters: Parameters
    names: Mapping[str, str]  # the base's tensor -> the expert's

    def sources(self) -> dict[str, Source]:
        """The base's tensor name -> the expert's own tensor."""
        tensors = self.parameters.checkpoint.tensors
        return {name: FullSource(str(tensors[own].file), own) for name, own in self.names.items()}


def plan_full(
    frame: Parameters,
    expert: str,
    path: Path,
    ignore: Sequence[str],
    allow_pickle: bool,
    shared_vocabulary: bool,
    whole_head: bool = False,
    choice: TokenizerChoice = TokenizerChoice(),  # noqa: B008 - frozen
) -> FullExpert:
    """A full fine-tuned model against the base, from headers. Raises ValueError, one line per mismatch.

    With `whole_head` its head is its own, whatever the base has. `choice` may match rows by token later.
    """
    shared_vocabulary = shared_vocabulary or choice.moves_rows
    checkpoint, base = open_checkpoint(path, allow_pickle), frame.checkpoint
    problems = _other_model(frame, checkpoint, shared_vocabulary)
    own = open_parameters(checkpoint, ignore)
    fitted = fitted_names(own.meta_model, own.names.values(), frame)
    apart = own_parameters(own, frame, fitted, whole_head)
    shared = own.files.keys() - apart
    names = {name: own.files[fitted[key]] for key, name in frame.files.items() if fitted.get(key) in shared}
    settings = own.meta_model.config
    file = path / "config.json"
    problems += configuration_mismatches(frame.meta_model, settings, file, bool(apart), choice)
    problems += _shapes(checkpoint, base, names, shared_vocabulary)
    problems += tie_mismatches(own, frame, {key: name for key, name in fitted.items() if name not in apart})
    problems += lost_ties(own, ignore)
    problems += _one_sided(own, frame, fitted, names, apart)
    if problems:
        raise ValueError("\n".join(problems))
    warn_of_generation(base.path, frame.meta_model.config, path, settings, choice)
    _warn_of_dtypes(expert, checkpoint, base, names)
    return FullExpert(own, names)


def _other_model(frame: Parameters, checkpoint: Checkpoint, shared_vocabulary: bool) -> list[str]:
    """One line if the vocabulary has another size. Raises ValueError for another type of model."""
    base, path = frame.checkpoint, checkpoint.path
    remedies = {"model_type": "leave it out"} | ({} if shared_vocabulary else {"vocab_size": RESIZED})
    different = [key for key in remedies if _setting(checkpoint, key) != _setting(base, key)]
    if "model_type" in different and (part := _part(frame, str(_setting(checkpoint, "model_type")))):
        raise ValueError(
            f"{path}: a {_setting(checkpoint, 'model_type')}, which is the part {part!r} of the base's "
            f"{type(frame.meta_model).__name__}. Use that part alone as the base (save it to a folder of its "
            "own), or save the expert as the whole model"
        )
    problems = [
        f"{path}: {key} is {_setting(checkpoint, key)!r}, the base has {_setting(base, key)!r}: not a "
        f"fine-tuned copy of this base; {remedies[key]}"
        for key in different
    ]
    if "model_type" in different:  # nothing below would match
        raise ValueError("\n".join(problems))
    return problems


def _part(frame: Parameters, model_type: str) -> str | None:
    """The base's submodel of this type, a tower say."""
    name: str
    for name, module in frame.meta_model.named_modules():
        if name and isinstance(module, PreTrainedModel) and module.config.model_type == model_type:
            return name
    return None


def _shapes(
    checkpoint: Checkpoint, base: Checkpoint, names: Mapping[str, str], shared_vocabulary: bool
) -> list[str]:
    """Tensors of other shapes; with a shared vocabulary, the number of tokens may differ."""
    sizes = _setting(checkpoint, "vocab_size"), _setting(base, "vocab_size")
    problems = []
    for name, theirs in names.items():
        shape, want = tuple(checkpoint.tensors[theirs].shape), tuple(base.tensors[name].shape)
        resized = (shape[0], want[0]) == sizes and shape[1:] == want[1:] if shape and want else False
        if shape != want and not (resized and shared_vocabulary):
            problems.append(
                f"{theirs} is {shape}, the base's {name} is {want}; exclude it with ignore=['{name}']"
            )
    return problems


def _one_sided(
    own: Parameters, frame: Parameters, fitted: Mapping[str, str], names: Mapping[str, str], apart: set[str]
) -> list[str]:
    """Tensors that only the expert, or only the base, has; computed positions are equal in both.

    An expert with a head of its own, the parameters `apart`, may lack the base's.
    """
    tied = {*frame.meta_model.all_tied_weights_keys, *own.meta_model.all_tied_weights_keys}
    common = [key for key in fitted if key in frame.files]
    # Including ignored ones, and those that `lost_ties` finds missing from the base's files.
    known = {*frame.names.values(), *tied, *(frame.meta_model._tied_weights_keys or {})}
    shared = {name for name in own.files.keys() - apart if not stored_as_computed(own, name)}
    extra = [own.files[name] for key, name in fitted.items() if key not in known and name in shared]
    missing = [
        name
        for key, name in frame.files.items()
        if key not in fitted
        and key not in tied
        and not stored_as_computed(frame, key)
        and not (apart and above(frame.meta_model, key, common))
    ]
    return [
        *_groups(own.checkpoint, extra, names.values(), "which the base lacks"),
        *_groups(frame.checkpoint, missing, names, "which the expert lacks"),
    ]


def _setting(checkpoint: Checkpoint, key: str) -> object:
    """A field of config.json, or of its text model's."""
    config = checkpoint.config
    return config.get(key, text_settings(config).get(key))


def fitted_names(model: PreTrainedModel, names: Iterable[str], frame: Parameters) -> dict[str, str]:
    """The base's parameter name -> the expert's, where only the prefix of the headless model may differ.

    `names` are the parameters of the expert's `model`.
    """
    prefixes = {frame.meta_model.base_model_prefix, model.base_model_prefix}
    fits = fit_prefix(names, frame.names.values(), sorted(prefixes))
    return {theirs: name for name, theirs in fits.items()}


def _groups(checkpoint: Checkpoint, names: Iterable[str], common: Iterable[str], what: str) -> list[str]:
    """One line for each pattern that would match tensors of one side only."""
    common = list(common)
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        heads = [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]
        free = [head + "*" for head in heads if not any(other.startswith(head) for other in common)]
        tensor = f"{name} {tuple(checkpoint.tensors[name].shape)}"
        groups.setdefault((free or [name])[0], []).append(tensor)
    return [
        f"{checkpoint.path} has {shorten(tensors)}, {what}; {_remedy(pattern)}"
        for pattern, tensors in groups.items()
    ]


def _remedy(pattern: str) -> str:
    if ".experts." in pattern:
        return (
            "if one has a matrix per expert and the other stacks of all, load both with transformers and "
            "save them again"
        )
    return f"if it is a task's head, exclude it with ignore=['{pattern}']"


def _warn_of_dtypes(expert: str, checkpoint: Checkpoint, base: Checkpoint, names: Mapping[str, str]) -> None:
    pairs = {
        (str(checkpoint.tensors[own].dtype), str(base.tensors[name].dtype)) for name, own in names.items()
    }
    mixed = ", ".join(f"{theirs} against {ours}" for theirs, ours in sorted(pairs) if theirs != ours)
    if mixed:
        message = (
            f"expert {expert} ({checkpoint.path}) and the base differ in dtype: {mixed}; differences are"
        )
        warnings.warn(f"{message} taken in float32", stacklevel=7)
