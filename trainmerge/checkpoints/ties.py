"""Tied parameters: two names of one tensor, most often the embedding and the output head.

A merge keeps the base's ties. An expert that changed one side only is another function than its merge, so it
is refused; an untied copy of the base has both sides as tensors of their own, and merges them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.task_vectors.parameter_names import matches

OF_BOTH_SIDES = ".token_adapter."  # peft's trainable tokens, which change the head of a tied model too
COPY_OF_EMBEDDING = ".base_layer.weight"  # peft saves a copy of an embedding that it adapts


def untie_advice(*folders: Path) -> str:
    """How to get copies of tied models in which both sides are tensors of their own."""
    calls = " and ".join(f"`trainmerge.untie({str(folder)!r}, COPY)`" for folder in folders)
    return f"{calls} in Python writes an untied copy of equal outputs; name copies in the recipe"


def differing_ties(parameters: Parameters) -> list[str]:
    """Tensors that config.json ties but that differ in the files. Reads them."""
    checkpoint = parameters.checkpoint
    return [
        f"{checkpoint.path}: {name} and {other} differ, config.json ties them. If they were trained apart, "
        "set tie_word_embeddings to false in this config.json, and use untied copies of the base and other "
        f"tied experts (`trainmerge.untie(FOLDER, COPY)` in Python). If not, remove {other} from the files"
        for name, others in parameters.duplicates().items()
        for other in others
        if not torch.equal(checkpoint.read(name), checkpoint.read(other))
    ]


def lost_ties(parameters: Parameters, ignore: Sequence[str] = ()) -> list[str]:
    """Parameters that the files lack since they were tied, where config.json no longer ties them."""
    model, there = parameters.meta_model, set(parameters.names.values())
    own = {name for name, _ in model.named_parameters()}
    return [
        f"{parameters.checkpoint.path}: the files lack {name}, and config.json does not tie it to {source}, "
        "so it would be random. Set tie_word_embeddings to true there if they are tied. For a tensor of its "
        f"own, do so and then use a copy that was saved untied: {untie_advice(parameters.checkpoint.path)}"
        for name, source in declared_ties(model).items()
        if name in own - there and source in there and not matches(name, ignore)
    ]


def tie_mismatches(own: Parameters, frame: Parameters, fitted: Mapping[str, str]) -> list[str]:
    """Parameters that are tied in the base and untied in the expert, or the reverse.

    `fitted` maps the base's parameter names to the expert's.
    """
    ours, theirs = frame.meta_model.all_tied_weights_keys, own.meta_model.all_tied_weights_keys
    problems = [
        f"{own.files[fitted[key]]} {tuple(own.checkpoint.tensors[own.files[fitted[key]]].shape)} is untied, "
        f"the base ties it to {ours[key]}: {untie_advice(frame.checkpoint.path)}"
        for key in fitted
        if key in ours and key not in frame.files and fitted[key] in own.files
        if not _equal(own, fitted[key], fitted.get(ours[key], ""))
    ]
    return problems + [
        f"{name} {tuple(frame.checkpoint.tensors[name].shape)} is untied in the base, the expert ties it to "
        f"{theirs[key]}: {untie_advice(own.checkpoint.path)}"
        for key, name in frame.files.items()
        if key in theirs and key not in fitted
    ]


def _equal(own: Parameters, one: str, other: str) -> bool:
    """Whether two untied parameters have the same values, so that a tied merge is exact. Reads them."""
    if other not in own.files:
        return False
    values = [own.checkpoint.read(own.files[name]) for name in (one, other)]
    return values[0].shape == values[1].shape and torch.equal(*values)


def one_sided_updates(base: Parameters, adapter: Path, keys: Iterable[str]) -> list[str]:
    """Tied parameters of the base that an adapter changes on one side only, or by one update per side.

    `keys` are the adapter's tensors, under the base's module names.
    """
    keys = [key for key in keys if not key.endswith(COPY_OF_EMBEDDING) and OF_BOTH_SIDES not in key]
    sides: dict[int, list[str]] = {}
    for name, parameter in base.meta_model.named_parameters(remove_duplicate=False):
        sides.setdefault(id(parameter), []).append(name)
    problems = []
    for names in (names for names in sides.values() if len(names) > 1):
        changed = {name: [key for key in keys if _changes(key, name)] for name in names}
        touched = [key for own in changed.values() for key in own]
        whole = all(name in changed[name] for name in names)  # saved as weights, on every side
        if touched and not whole:
            problems.append(
                f"{adapter}: {shorten(touched)} changes one of the tied parameters {' and '.join(names)}; "
                "the merge, which ties them, would be another function than the adapter. Use an untied base: "
                f"{untie_advice(base.checkpoint.path)}"
            )
    return problems


def _changes(key: str, parameter: str) -> bool:
    """Whether an adapter's tensor belongs to a parameter: to its module's weight, or the parameter itself."""
    module, _, leaf = parameter.rpartition(".")
    inside = key.removeprefix(f"{module}.")
    return key == parameter or (leaf == "weight" and inside != key and inside not in ("bias", "weight"))


def declared_ties(model: object) -> dict[str, str]:
    """Parameter -> the one that this class ties it to, if config.json says so."""
    declared = getattr(model, "_tied_weights_keys", None)
    return dict(declared) if isinstance(declared, Mapping) else {}
