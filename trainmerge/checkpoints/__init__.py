"""Disk <-> tensors: base models, full experts and peft adapters, checked before any weight is read.

Names that need transformers or peft are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainmerge.checkpoints.choice import TokenizerChoice, TokenRow
from trainmerge.checkpoints.chosen_base import with_rows
from trainmerge.checkpoints.integrity import (
    Stamp,
    as_recorded,
    as_then,
    fingerprint,
    same_weights,
    stamps,
    verify,
)
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.side_modules import (
    SideModule,
    layer_name,
    module_folders,
    read_modules,
    side_folder,
)
from trainmerge.checkpoints.sources import Sources

if TYPE_CHECKING:
    from trainmerge.checkpoints.adapter_targets import LoraTarget, LoraTargets, lora_targets
    from trainmerge.checkpoints.chosen_folder import tokenizer_folder
    from trainmerge.checkpoints.compatibility import Rules, find_chosen, find_sources
    from trainmerge.checkpoints.computed_positions import compute, computed_parameters
    from trainmerge.checkpoints.config_translation import translated_config
    from trainmerge.checkpoints.expert_heads import find_own_heads
    from trainmerge.checkpoints.head_parts import may_have_head
    from trainmerge.checkpoints.linear_head import beyond_linear
    from trainmerge.checkpoints.meta_model import build_meta_model
    from trainmerge.checkpoints.model import (
        LoadedModel,
        check_tensors,
        empty_model,
        load_meta_model,
        load_model,
    )
    from trainmerge.checkpoints.output import Output, output_of, output_of_class
    from trainmerge.checkpoints.own_head import OwnHead
    from trainmerge.checkpoints.prediction_layers import extra_layers
    from trainmerge.checkpoints.side_layers import attach_side_layers
    from trainmerge.checkpoints.tensor_names import locate
    from trainmerge.checkpoints.tokenizer_check import same_ids

_HEAVY = {
    "attach_side_layers": "side_layers",
    "check_tensors": "model",
    "compute": "computed_positions",
    "computed_parameters": "computed_positions",
    "beyond_linear": "linear_head",
    "empty_model": "model",
    "extra_layers": "prediction_layers",
    "find_own_heads": "expert_heads",
    "find_chosen": "compatibility",
    "find_sources": "compatibility",
    "Rules": "compatibility",
    "same_ids": "tokenizer_check",
    "tokenizer_folder": "chosen_folder",
    "LoadedModel": "model",
    "LoraTarget": "adapter_targets",
    "LoraTargets": "adapter_targets",
    "lora_targets": "adapter_targets",
    "load_meta_model": "model",
    "load_model": "model",
    "Output": "output",
    "OwnHead": "own_head",
    "build_meta_model": "meta_model",
    "locate": "tensor_names",
    "may_have_head": "head_parts",
    "translated_config": "config_translation",
    "output_of": "output",
    "output_of_class": "output",
}

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "LoraTarget",
    "LoraTargets",
    "Output",
    "OwnHead",
    "Rules",
    "SideModule",
    "Sources",
    "Stamp",
    "TokenRow",
    "TokenizerChoice",
    "as_recorded",
    "as_then",
    "attach_side_layers",
    "beyond_linear",
    "build_meta_model",
    "check_tensors",
    "compute",
    "computed_parameters",
    "empty_model",
    "extra_layers",
    "find_chosen",
    "find_own_heads",
    "find_sources",
    "fingerprint",
    "layer_name",
    "load_meta_model",
    "load_model",
    "locate",
    "lora_targets",
    "may_have_head",
    "module_folders",
    "open_checkpoint",
    "output_of",
    "output_of_class",
    "read_modules",
    "same_ids",
    "same_weights",
    "side_folder",
    "stamps",
    "tokenizer_folder",
    "translated_config",
    "verify",
    "with_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"trainmerge.checkpoints.{_HEAVY[name]}"), name)
