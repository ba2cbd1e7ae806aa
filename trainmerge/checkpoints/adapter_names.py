"""The base's module of every tensor of an adapter, also under names that older transformers gave to it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.places import renamed

ROOT = "base_model.model."  # peft's name for the model that it wraps
WHOLE = "base_model."  # tensors of all layers together: VeRA's projections, VB-LoRA's bank
INNER = ("token_adapter", "base_layer")  # peft's own modules, whatever the kind of adapter
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
PATTERNS = ("rank_pattern", "alpha_pattern")

Place = Callable[[str], str]  # a tensor's name in the adapter -> its module's name there


def place_of(peft_type: str) -> Place:
    """The module that a tensor belongs to: its name up to what peft adds (`.lora_A`), or to the last dot."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(peft_type)]

    def place(key: str) -> str:
        words = key.split(".")
        ends = [i for i, word in enumerate(words) if word.startswith(prefix) or word in INNER]
        return ".".join(words[: ends[0]] if ends else words[:-1])

    return place


def base_names(base: Parameters, places: Sequence[str], known: set[str]) -> tuple[dict[str, str], bool]:
    """An adapter's module -> the base's, and whether the names are those of an older transformers.

    The base's own prefix (`bert.`) added to all, removed from all, or unchanged, or as transformers renames
    old checkpoints: whichever matches most modules.
    """
    prefix = base.meta_model.base_model_prefix
    modern = renamed(base.meta_model, [f"{place}.weight" for place in places])
    ways = [
        {place: place for place in places},
        {place: f"{prefix}.{place}" for place in places},
        {place: place.removeprefix(f"{prefix}.") for place in places},
        {place: modern[f"{place}.weight"].removesuffix(".weight") for place in places},
    ]
    best = max(ways, key=lambda way: sum(name in known for name in way.values()))
    return best, best is ways[-1]


def with_modern_names(config: Mapping[str, Any], modules: Sequence[str], file: str) -> dict[str, Any]:
    """The config with the adapted `modules` by name, instead of patterns for older names.

    Raises:
        ValueError: a pattern of ranks or scales fits no adapted module under its name in the base.
    """
    for key in PATTERNS:
        for pattern in config.get(key) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules):
                raise ValueError(
                    f"{file}: {key} has the pattern {pattern!r}, which fits no module under its name in this "
                    "transformers: write it with the name that the base's module has now"
                )
    return {**config, **dict.fromkeys(TARGETS), "target_modules": sorted(modules)}
