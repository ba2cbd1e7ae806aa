"""Names of linear layers that peft takes for experts of a mixture, so that it has no LoRA of these layers.

Adapters of transformers 4 targeted the experts' own layers (`gate_proj`, `w1`). peft moves such targets to
the stacks that transformers 5 has in their place, of whatever layer they were: a shared expert's or a dense
layer's `gate_proj` cannot be named.
"""

from collections.abc import Iterable

from peft import LoraConfig
from peft.utils import transformers_weight_conversion
from torch import nn


def claimed(model: nn.Module, modules: Iterable[str]) -> set[str]:
    """The modules among these, by name, that peft would take for experts."""
    leaves: dict[str, set[str]] = {}
    for module in modules:
        leaves.setdefault(module.rpartition(".")[2], set()).add(module)
    return {module for leaf, own in leaves.items() if _is_claimed(model, leaf) for module in own}


def _is_claimed(model: nn.Module, leaf: str) -> bool:
    config = LoraConfig(target_modules=[leaf])
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two matrices that were fused
        return True
    return leaf not in (config.target_modules or ())
