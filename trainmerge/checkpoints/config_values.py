"""A parsed config.json as flat keys and values, where equal settings have equal values.

transformers fills in defaults and renames old keys on parsing. What is left of other
spellings is undone here: heads that follow from other keys, rotary embeddings without effect, one token id
against a list of one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # defaults of transformers' rotary embeddings
WHOLE = ("id2label", "label2id", "task_specific_params", "layer_types")  # compared as one value


def flat_values(config: PreTrainedConfig) -> dict[str, Any]:
    """`text_config.rope_parameters.rope_theta` -> value, of a configuration and its parts."""
    return dict(_flat(_completed(config.to_dict()), ""))


def same_value(key: str, one: Any, other: Any) -> bool:
    """Whether two values of a key mean the same; activations are compared as functions."""
    if isinstance(one, str) and isinstance(other, str) and one in ACT2FN and other in ACT2FN:
        return _same_activation(one, other)
    if key.endswith(("_token_id", "_token_ids")):
        return _as_list(one) == _as_list(other)
    return bool(_as_tuples(one) == _as_tuples(other))


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings with keys that follow from others filled in, in all parts."""
    values = {key: _completed(value) if _is_part(key, value) else value for key, value in values.items()}
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if isinstance(heads, int) and heads and isinstance(width, int):
        values["head_dim"] = values.get("head_dim") or width // heads
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    if values.get("layer_types") and "sliding_attention" not in values["layer_types"]:
        values.pop("sliding_window", None)  # no layer has one
    if isinstance(values.get("rope_parameters"), dict):
        values["rope_parameters"] = _rotary(values["rope_parameters"])
    return values


def _rotary(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, of one kind or per type of layer, without what has no effect."""
    if rope and all(value is None or isinstance(value, dict) for value in rope.values()):
        return {layers: _rotary(own or {}) for layers, own in rope.items()}
    own = {key: value for key, value in rope.items() if value is not None and key != "type"}
    kind = own.setdefault("rope_type", rope.get("type") or "default")
    if kind == "mrope":  # the name in files of older versions
        kind = own["rope_type"] = "default"
    if kind == "linear" and own.get("factor") == 1:
        kind = own["rope_type"] = "default"
    if kind == "default":
        own = {key: value for key, value in own.items() if key not in ("factor", *YARN, "attention_factor")}
    if own.get("partial_rotary_factor") == 1:
        del own["partial_rotary_factor"]
    return {**YARN, **own} if kind == "yarn" else own


def _is_part(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key not in (*WHOLE, "rope_parameters")


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in WHOLE:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same_activation(one: str, other: str) -> bool:
    points = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        return torch.allclose(ACT2FN[one](points), ACT2FN[other](points), rtol=0, atol=1e-7)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return sorted(value, key=repr) if isinstance(value, list | tuple) else [value]


def _as_tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_tuples(entry) for entry in value)
    return value
