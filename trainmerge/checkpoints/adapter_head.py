"""The head that a peft adapter saved whole: which keys are its own, and the class that it belongs to.

peft wraps `AutoModelFor...` of the base and saves the task's head beside the update, but no configuration: it
has as many labels as its last matrix has rows, and they have no names.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from trainmerge.checkpoints.head_parts import adapter_task
from trainmerge.checkpoints.meta_model import quiet, shorten
from trainmerge.checkpoints.parameters import Parameters

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}  # modules that peft saves for a task without being told
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def is_own_key(
    base: Parameters, config: Mapping[str, Any], key: str, ours: str, shape: Sequence[int], whole: bool
) -> bool:
    """Whether a tensor of an adapter belongs to a head of its own.

    Args:
        base: The base's parameters.
        config: adapter_config.json.
        key: The tensor's name in the class that the adapter was made for.
        ours: Its name in the base.
        shape: Its shape.
        whole: Whether a head of the base's own shapes is its own too.

    Raises:
        ValueError: the head is adapted, not saved whole.
    """
    task = adapter_task(config)
    if task is None:
        return False
    saved = config.get("modules_to_save")
    heads = [*TASK_HEADS[task], *(saved if isinstance(saved, list) else [])]
    if not is_within(key, heads):
        return False
    parameters = dict(base.meta_model.named_parameters(remove_duplicate=False))
    known = parameters.get(ours)
    if known is None and "lora_" in key:
        if ours.partition(".lora_")[0] in dict(base.meta_model.named_modules()):
            return False  # an update of the base's own head is merged
        raise ValueError(
            f"{key} adapts the task's head, which the base lacks: merge the adapter into its head before "
            "(peft's merge_and_unload), or name the module in modules_to_save"
        )
    return known is None or tuple(known.shape) != tuple(shape) or (whole and not _in_backbone(base, ours))


def is_within(key: str, modules: Sequence[str]) -> bool:
    """Whether a tensor is of one of these modules, which are named by one or more steps of their path.

    >>> is_within("bert.pooler.dense.weight", ["classifier", "bert.pooler"])
    True
    """
    return any(f".{module}." in f".{key}." for module in modules)


def _in_backbone(base: Parameters, name: str) -> bool:
    prefix = base.meta_model.base_model_prefix
    return not hasattr(base.meta_model, prefix) or name.startswith(f"{prefix}.")


def class_of_adapter(
    base: Parameters, path: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> PreTrainedModel:
    """The model, without storage, of the class that an adapter's head belongs to.

    Args:
        base: The base's parameters.
        path: The adapter's folder, for errors.
        config: adapter_config.json.
        shapes: The head's own tensors.

    Raises:
        ValueError: transformers has no such class for the base, or the tensors are not those of its head.
    """
    task, kind = adapter_task(config), base.meta_model.config.model_type
    name = CLASSES[task or "SEQ_CLS"].get(kind)
    if name is None:
        raise ValueError(
            f"{path}: transformers has no class for {task} over a {kind}: set the expert's `head`"
        )
    made: type[PreTrainedModel] = getattr(transformers, name)
    for labels in dict.fromkeys(shape[0] for shape in shapes.values() if shape):
        settings = _settings(base.meta_model.config, name, labels)
        with quiet(), torch.device("meta"):
            model = made(settings)
        parameters = {key: tuple(p.shape) for key, p in model.named_parameters()}
        if all(parameters.get(key) == tuple(shape) for key, shape in shapes.items()):
            return model
    raise ValueError(f"{path}: {shorten(list(shapes))} are not the head of {name}: set the expert's `head`")


def _settings(base: PreTrainedConfig, name: str, labels: int) -> PreTrainedConfig:
    settings = deepcopy(base)
    settings.architectures = [name]
    settings.problem_type = None
    settings.num_labels = labels
    return settings
