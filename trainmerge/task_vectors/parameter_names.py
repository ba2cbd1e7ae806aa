"""A parameter's kind of module and its block, from its name alone, for any architecture."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

# The first pattern found in the lower-case name decides. Names are those of many transformers families.
KINDS = {
    "bias": r"bias$",
    "norm": r"norm|(^|\.)ln_?\w*\.|layer_?scale",
    "embedding": r"embed|(^|\.)w[tp]e\.|(^|\.)shared\.|relative_attention",
    "head": r"(lm_head|classifier|score|qa_outputs|(^|\.)cls)\.",
    "query, key, value": r"c_attn|qkv|query_key_value|in_proj",
    "query": r"query|q_proj|q_lin|(^|\.)(q|wq)\.",
    "key": r"key|k_proj|k_lin|(^|\.)(k|wk)\.",
    "value": r"value|v_proj|v_lin|(^|\.)(v|wv)\.",
    "attention out": r"o_proj|out_proj|out_lin|att\w*\.(output\.)?(dense|o|c_proj)\.|(^|\.)(o|wo)\.",
    "mlp gate": r"gate_proj|wi_0|(^|\.)(gate|w1)\.",
    "mlp up": r"up_proj|intermediate\.dense|fc1|fc_in|c_fc|lin1|wi(_1)?\.|h_to_4h|(^|\.)w3\.",
    "mlp down": r"down_proj|output\.dense|fc2|fc_out|c_proj|lin2|wo\.|4h_to_h|(^|\.)w2\.",
}
OTHER = "other"


def kind_of(name: str) -> str:
    """The kind of module of a parameter; `other` if no pattern matches.

    >>> kind_of("model.layers.3.self_attn.q_proj.weight")
    'query'
    >>> kind_of("encoder.layer.0.attention.output.dense.weight")
    'attention out'
    >>> kind_of("encoder.layer.0.output.dense.weight")
    'mlp down'
    >>> kind_of("decoder.block.2.layer.2.DenseReluDense.wo.weight")
    'mlp down'
    >>> kind_of("transformer.h.1.mlp.c_proj.weight")
    'mlp down'
    >>> kind_of("encoder.layer.0.output.LayerNorm.weight")
    'norm'
    """
    lower = name.lower()
    if re.search(r"dense\.wo\.", lower):
        return "mlp down"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), OTHER)


def number_of(name: str) -> tuple[str, int] | None:
    """The stack and number of a parameter's block; None outside numbered blocks.

    >>> number_of("encoder.layer.3.output.dense.weight")
    ('encoder.layer', 3)
    >>> number_of("embeddings.LayerNorm.weight") is None
    True
    """
    stack, _, number = block_of(name).rpartition(".")
    if number.isdigit():
        return stack, int(number)
    return None


def block_labels(blocks: Sequence[str]) -> list[str]:
    """Short names of blocks: numbers, prefixed by the stack if there are several, or module names.

    >>> block_labels(["model.encoder.layers.0", "model.decoder.layers.0", "model.norm"])
    ['enc 0', 'dec 0', 'norm']
    >>> block_labels(["encoder.layer.0", "encoder.layer.1"])
    ['0', '1']
    """
    numbers = [number_of(f"{block}.weight") for block in blocks]
    stacks = {number[0] for number in numbers if number}
    labels = []
    for block, number in zip(blocks, numbers, strict=True):
        if number is None:
            labels.append(block.rpartition(".")[2])
        else:
            others = [other.split(".") for other in stacks if other != number[0]]
            own = [part for part in number[0].split(".") if not all(part in other for other in others)]
            labels.append(f"{own[0][:3]} {number[1]}" if others and own else str(number[1]))
    return labels


def block_of(name: str) -> str:
    """The block of a parameter: its name up to the first number, else its module.

    >>> block_of("model.layers.3.mlp.up_proj.weight")
    'model.layers.3'
    >>> block_of("embeddings.LayerNorm.weight")
    'embeddings.LayerNorm'
    """
    numbered = re.match(r"((?:.*?\.)??\d+)\.", name)
    return numbered.group(1) if numbered else name.rpartition(".")[0] or name


def matches(name: str, patterns: Iterable[str]) -> str:
    """The first fnmatch pattern that matches `name`; empty if none does.

    >>> matches("layers.0.norm.weight", ["*.bias", "*norm*"])
    '*norm*'
    """
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")


def idle_patterns(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The patterns that match none of the names."""
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def attention_heads(config: Mapping[str, Any], name: str = "") -> tuple[int, int]:
    """Numbers of query and key heads of the part of a model that has parameter `name`.

    1 where its configuration gives none, or one number per stage.
    """
    own = _part(config, name.lower())
    keys = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    heads = next((own[key] for key in keys if isinstance(own.get(key), int) and own[key] > 0), 1)
    shared = own.get("num_key_value_heads")
    return heads, shared if isinstance(shared, int) and shared > 0 else heads


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The configuration of a part: `vision_config` of `vision_tower...`; the text model's elsewhere."""
    parts = {
        key.removesuffix("_config"): part
        for key, part in config.items()
        if key.endswith("_config") and isinstance(part, Mapping)
    }
    words = {stem: (stem, "visual") if stem == "vision" else (stem,) for stem in parts if stem != "text"}
    for stem, known in words.items():
        if any(word in name for word in known):
            return parts[stem]
    return parts.get("text", config)
