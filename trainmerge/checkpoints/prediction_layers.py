"""Layers of multi-token prediction, which the files of some models have and transformers does not run.

DeepSeek-V3 and GLM-4-MoE number them after the last layer, Qwen3-Next calls them `mtp`. transformers leaves
them out by its own list.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedModel

PLACE = re.compile(r"(?:^|\.)(?:mtp\.|layers\.(\d+)\.)")


def extra_layers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The tensors of such layers, among the names of a checkpoint's files."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    found = []
    for name in names:
        place = PLACE.search(name)
        own = place and place[1] and (depth is None or int(place[1]) < depth)
        if place and not own and any(pattern.search(name) for pattern in patterns):
            found.append(name)
    return found
