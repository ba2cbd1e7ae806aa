"""A checkpoint's config.json as that of another model type with the same attention, embeddings and norms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from trainmerge.checkpoints.meta_model import quiet
from trainmerge.checkpoints.model_config import read_model_config
from trainmerge.system.json_file import read_json

OWN = ("model_type", "architectures", "auto_map", "transformers_version")
LAYERS = "layer_types"


def translated_config(base: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json for the type `changes["model_type"]`: the base's, then `changes`.

    Settings that the base leaves to the defaults of its type are written out where the other type has another
    default (`rope_theta`, say). Those that the other type does not know are left out: where they make
    parameters, the files do not fit, and `check_tensors` says so.

    Raises:
        ValueError: a setting that both types know would differ, or layers of sliding windows that the other
            type does not have.
    """
    with quiet():
        source, kind = read_model_config(base), CONFIG_MAPPING[changes["model_type"]]
        default, ours = kind().to_dict(), source.to_dict()
    given = read_json(base / "config.json", "Download or save it again.")
    kept = {
        key: value for key, value in given.items() if key not in OWN and (key not in ours or key in default)
    }
    filled = {
        key: value
        for key, value in ours.items()
        if key in default and key not in (*OWN, *given) and value != default[key]
    }
    content = {**kept, **filled, **_head_size(ours), **changes}
    with quiet():
        made = kind(**content).to_dict()
    windows = {*(ours.get(LAYERS) or ()), "full_attention"} - {*(made.get(LAYERS) or ()), "full_attention"}
    wrong = [
        f"{key} is {value!r} and would be {made[key]!r}"
        for key, value in ours.items()
        if key in made and key not in (*OWN, *changes) and made[key] != value and (made[key] or value)
    ]
    if wrong or windows:
        lines = [
            *wrong,
            *(f"it has layers of {kind}, which the other type has not" for kind in sorted(windows)),
        ]
        raise ValueError(f"{base}: cannot be written as {changes['model_type']}: {'; '.join(lines)}")
    return content


def _head_size(ours: Mapping[str, Any]) -> dict[str, int]:
    """The size of an attention head, which some types take from the hidden size and others do not."""
    size = ours.get("head_dim") or ours["hidden_size"] // ours["num_attention_heads"]
    return {"head_dim": size}
