"""The tensors that an adapter's config promises: peft is asked, on a model without storage."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from trainmerge.checkpoints.adapter import Adapter
from trainmerge.checkpoints.adapter_head import TASK_HEADS, is_within
from trainmerge.checkpoints.adapter_names import ROOT, place_of
from trainmerge.checkpoints.meta_model import build_meta_model, quiet, shorten
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.task_vectors.parameter_names import matches

RESIZED = (
    "the vocabulary was resized; resize the base's too (model.resize_token_embeddings) and save it again, or "
    "set vocabulary=shared to merge the common tokens, or tokenizer=union to keep all of them"
)


@dataclass(frozen=True)
class Promises:
    """The adapter's layers in a model without storage, and what the adapter's file has beyond them."""

    model: PreTrainedModel | None  # None: peft cannot build this kind without weights
    copies: Sequence[str]  # keys of embeddings that were saved whole, not as modules to save
    rows: int | None  # of the adapter's embeddings, if they differ from the base's


def check_promises(base: Parameters, adapter: Adapter, ignore: Sequence[str], shared: bool) -> Promises:
    """Compare the adapter's tensors with those that peft would save for its config.

    Args:
        base: The base's parameters.
        adapter: The adapter's headers.
        ignore: Patterns of tensors that may be missing.
        shared: Whether a resized vocabulary is merged in its common tokens.

    Raises:
        ValueError: lists every tensor that is missing, unknown, or of another shape.
    """
    copies = [key for key in adapter.keys if _is_copy(base, key)]
    rows = _resized(base, adapter)
    if rows is not None and not shared:
        key, size = rows
        raise ValueError(
            f"{adapter.file}: {key} is {tuple(adapter.info(key).shape)}, the base's embedding has {size} "
            f"rows: {RESIZED}"
        )
    count = adapter.info(rows[0]).shape[0] if rows else None
    model = build_meta_model(base.checkpoint.path)
    if count is not None:
        with quiet(), torch.device("meta"):
            model.resize_token_embeddings(count, mean_resizing=False)
    try:
        with quiet(), torch.device("meta"):
            wrapped = get_peft_model(model, injected_config(base, adapter, ignore))
            expected = saved_tensors(wrapped)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{adapter.path}: does not match the base: {error}".replace("\n", " ")) from error
    except Exception:  # some kinds compute with the weights that they start from: checked when merged
        return Promises(None, copies, count)
    problems = adapter_problems(adapter, expected, ignore, copies)
    if problems:
        raise ValueError("\n".join(problems))
    return Promises(model, [key for key in copies if adapter.peft_name(key) not in expected], count)


def injected_config(base: Parameters, adapter: Adapter, ignore: Sequence[str]) -> Any:
    """peft's config for injecting layers without weights: no task's heads but those of the base."""
    changes: dict[str, Any] = {"modules_to_save": modules_to_save(base, adapter, ignore), "task_type": None}
    if adapter.peft_config().__class__ is LoraConfig:
        changes["init_lora_weights"] = True  # the others read weights
    return adapter.peft_config(**changes)


def modules_to_save(base: Parameters, adapter: Adapter, ignore: Sequence[str]) -> list[str] | None:
    """The modules that the adapter replaces as a whole, by peft's rule: those whose names end so.

    Names of modules that the base lacks, that are ignored, or that are its own head are left out. The base
    may lack the prefix of the class that the adapter was made for: `bert.`.
    """
    heads = TASK_HEADS.get(str(adapter.config.get("task_type")), ())
    names = dict.fromkeys([*(adapter.config.get("modules_to_save") or []), *heads])
    start = f"{base.meta_model.base_model_prefix}."
    free = [
        name
        for name, module in base.meta_model.named_modules()
        if any(not matches(f"{name}.{own}", ignore) for own, _ in module.named_parameters())
    ]
    kept = [name for name in names if not any(is_within(key, [name]) for key in adapter.own)]
    ways = dict.fromkeys(way for name in kept for way in (name, name.removeprefix(start)))
    return [way for way in ways if any(module.endswith(way) for module in free)] or None


def saved_tensors(wrapped: PeftModel | nn.Module) -> dict[str, torch.Size]:
    """peft's names and shapes of the tensors that it would save, without copies of embeddings."""
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in state.items()}


def adapter_problems(
    adapter: Adapter, expected: Mapping[str, torch.Size], ignore: Sequence[str], copies: Sequence[str]
) -> list[str]:
    """One line for every tensor that is missing, that peft would not read, or that has another shape."""
    file = adapter.file
    have = {adapter.peft_name(key): key for key in adapter.keys}
    lost = {name: shape for name, shape in expected.items() if name not in have}
    problems = []
    place = place_of(adapter.config["peft_type"])
    begun = {place(key) for key in adapter.keys}
    for name, shape in lost.items():
        key = name.removeprefix(ROOT)
        if not matches(key, ignore) or place(key) in begun:
            problems.append(
                f"{file}: {key} {tuple(shape)} is missing, which adapter_config.json promises: download or "
                f"save the adapter again, or leave the module out with ignore=['{place(key)}.*']"
            )
    strange = [key for name, key in have.items() if name not in expected and key not in copies]
    if strange:
        problems.append(
            f"{file}: {shorten(strange)} does not belong to a module that its config adapts, so peft does "
            "not use it: save the adapter again with the config of its training"
        )
    return [*_shapes(adapter, have, expected), *problems]


def _shapes(adapter: Adapter, have: Mapping[str, str], expected: Mapping[str, torch.Size]) -> list[str]:
    """Tensors of other shapes, after one line that says what several of them mean."""
    file, found = adapter.file, []
    for name, key in have.items():
        got = tuple(adapter.info(key).shape)
        if name in expected and got != tuple(expected[name]):
            found.append(f"{file}: {key} is {got}, this base needs {tuple(expected[name])}: another base?")
    if len(found) < 2:
        return found
    verdict = f"{len(found)} of its {len(have)} tensors have other shapes than this base needs"
    return [f"{file}: an adapter of another base: {verdict}, as listed below", *found]


def _embeddings(base: Parameters) -> list[str]:
    """The modules of the base's input and output embeddings."""
    model: Any = base.meta_model
    ends = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # models of pictures and texts together have no single one
            ends.append(get())
    return [
        name
        for name, module in model.named_modules()
        if any(module is end for end in ends if end is not None)
    ]


def _is_copy(base: Parameters, key: str) -> bool:
    """Whether a tensor is an embedding saved whole, of a module that is adapted or not."""
    place, _, end = key.rpartition(".")
    return end in ("weight", "bias") and place.removesuffix(".base_layer") in _embeddings(base)


def _resized(base: Parameters, adapter: Adapter) -> tuple[str, int] | None:
    """The key of an embedding with other rows than the base's, and the base's rows."""
    parameters = dict(base.meta_model.named_parameters(remove_duplicate=False))
    for key in adapter.keys:
        if _is_copy(base, key) and key.endswith(".weight"):
            own = parameters[key.removesuffix(".weight").removesuffix(".base_layer") + ".weight"]
            if adapter.info(key).shape[0] != own.shape[0]:
                return key, own.shape[0]
    return None
