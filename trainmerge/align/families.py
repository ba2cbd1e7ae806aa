"""Which axes of which tensors share their units, for families of models whose functions permit exchanges.

A touch is one axis of a tensor that runs over the units of a space: the residual stream, the neurons of a
layer, its heads. Applying one permutation to every touch of a space leaves the model's function unchanged.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

STREAM = "stream"
INNER = ("neurons", "query", "key", "value", "output")  # spaces of one layer
Gauges = Literal["any", "rotary", "none"]


class Touch(NamedTuple):
    """One axis, or the `part`-th of `parts` equal parts of it, runs over the units of a space."""

    space: str
    axis: int
    part: int = 0
    parts: int = 1


Table = Mapping[str, tuple[Touch, ...]]


def linear(
    name: str, out: str | None, into: str | None, turned: bool = False
) -> dict[str, tuple[Touch, ...]]:
    """Weight and bias of a linear layer [outputs, inputs], or [inputs, outputs] if `turned` (Conv1D)."""
    first, last = (1, 0) if turned else (0, 1)
    weight = [Touch(space, axis) for space, axis in ((out, first), (into, last)) if space]
    return {f"{name}.weight": tuple(weight), f"{name}.bias": (Touch(out, 0),) if out else ()}


def with_free_scale(tensors: Mapping[str, tuple[Touch, ...]], space: str) -> dict[str, tuple[Touch, ...]]:
    """The tensors of a gated layer with a further space over their neurons, whose scale is free."""
    return {
        name: (*own, *(touch._replace(space=space) for touch in own if touch.space == "neurons"))
        for name, own in tensors.items()
    }


def norm(name: str, space: str | None = STREAM) -> dict[str, tuple[Touch, ...]]:
    """Gain and shift of a norm, by their names of today and of early checkpoints."""
    own = (Touch(space, 0),) if space else ()
    return {f"{name}.{kind}": own for kind in ("weight", "bias", "gamma", "beta")}


def attention(query: str, key: str, value: str, output: str) -> dict[str, tuple[Touch, ...]]:
    """The four linear layers of attention."""
    pairs = (("query", query), ("key", key), ("value", value))
    inputs = [linear(name, space, STREAM) for space, name in pairs]
    return inputs[0] | inputs[1] | inputs[2] | linear(output, STREAM, "output")


def embeddings(*names: str) -> dict[str, tuple[Touch, ...]]:
    """Embeddings [tokens, stream]."""
    return {f"{name}.weight": (Touch(STREAM, 1),) for name in names}


@dataclass(frozen=True)
class Family:
    """The tensors of a family of models, and the axes of each.

    Args:
        prefixes: What may stand before every name.
        layer: Matches a layer's name.
        inside: The tensors of a layer.
        outside: The other tensors.
        gauges: The changes of query and key that keep attention: any invertible matrix per head, or a
            rotation and scale per pair (j, j + d/2) under rotary positions.
        readers: Heads that read the stream, or the pooler's output if there is a pooler.
        pictures: Whether its input is pictures.
    """

    prefixes: tuple[str, ...]
    layer: str
    inside: Table
    outside: Table
    gauges: Gauges = "any"
    readers: tuple[str, ...] = ()
    pictures: bool = False

    def place(self, name: str) -> tuple[str, str]:
        """The layer of a tensor (empty outside of layers), and its name there."""
        prefix = next((one for one in self.prefixes if name.startswith(one)), "")
        found = re.match(rf"({self.layer})\.(.+)", name[len(prefix) :])
        return (prefix + found[1], found[2]) if found else ("", name[len(prefix) :])

    def touches(self, name: str, pooled: bool) -> tuple[Touch, ...] | None:
        """The axes of a tensor, by the spaces' own names; None for a tensor that is not known."""
        layer, inside = self.place(name)
        found = (self.inside if layer else self.outside).get(inside)
        if found is not None or layer or not inside.startswith(self.readers or ("\0",)):
            return found and tuple(t._replace(space=space_of(layer, t.space)) for t in found)
        return (Touch(STREAM, 1),) if inside.endswith("weight") and not pooled else ()


def space_of(layer: str, kind: str) -> str:
    """`model.layers.3 neurons`; the stream is one for all layers."""
    return STREAM if kind == STREAM else f"{layer} {kind}"


DECODER = Family(
    ("model.",),
    r"layers\.\d+",
    attention(*(f"self_attn.{kind}_proj" for kind in "qkvo"))
    | linear("mlp.gate_proj", "neurons", STREAM)
    | with_free_scale(linear("mlp.up_proj", "neurons", STREAM), "up")
    | with_free_scale(linear("mlp.down_proj", STREAM, "neurons"), "down")
    | norm("input_layernorm") | norm("post_attention_layernorm")
    | norm("pre_feedforward_layernorm") | norm("post_feedforward_layernorm")
    | norm("self_attn.q_norm", None) | norm("self_attn.k_norm", None),
    embeddings("embed_tokens") | norm("norm") | linear("lm_head", None, STREAM),
    "rotary",
    ("score.",),
)  # fmt: skip
BERT = Family(
    ("bert.", "roberta."),
    r"encoder\.layer\.\d+",
    attention("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    | norm("attention.output.LayerNorm") | norm("output.LayerNorm")
    | linear("intermediate.dense", "neurons", STREAM) | linear("output.dense", STREAM, "neurons"),
    embeddings(*(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")))
    | norm("embeddings.LayerNorm") | linear("pooler.dense", None, STREAM)
    | linear("cls.predictions.transform.dense", STREAM, STREAM) | norm("cls.predictions.transform.LayerNorm")
    | linear("cls.predictions.decoder", None, STREAM) | {"cls.predictions.bias": ()}
    | linear("cls.seq_relationship", None, None)
    | linear("lm_head.dense", STREAM, STREAM) | norm("lm_head.layer_norm")
    | linear("lm_head.decoder", None, STREAM) | {"lm_head.bias": ()}
    | linear("classifier.dense", None, STREAM) | linear("classifier.out_proj", None, None),
    readers=("classifier.", "qa_outputs."),
)  # fmt: skip
FUSED = {
    "attn.c_attn.weight": (*(Touch(s, 1, i, 3) for i, s in enumerate(INNER[1:4])), Touch(STREAM, 0)),
    "attn.c_attn.bias": tuple(Touch(s, 0, i, 3) for i, s in enumerate(INNER[1:4])),
}
GPT2 = Family(
    ("transformer.",),
    r"h\.\d+",
    FUSED | linear("attn.c_proj", STREAM, "output", turned=True) | norm("ln_1") | norm("ln_2")
    | linear("mlp.c_fc", "neurons", STREAM, turned=True)
    | linear("mlp.c_proj", STREAM, "neurons", turned=True),
    embeddings("wte", "wpe") | norm("ln_f") | linear("lm_head", None, STREAM),
    readers=("score.", "classifier.", "qa_outputs."),
)  # fmt: skip
VIT = Family(
    ("vit.",),
    r"(?:encoder\.layer|layers)\.\d+",  # in files, and in memory
    attention(
        "attention.attention.query", "attention.attention.key", "attention.attention.value",
        "attention.output.dense",
    )
    | linear("intermediate.dense", "neurons", STREAM) | linear("output.dense", STREAM, "neurons")
    | attention(*(f"attention.{kind}_proj" for kind in "qkvo"))
    | linear("mlp.fc1", "neurons", STREAM) | linear("mlp.fc2", STREAM, "neurons")
    | norm("layernorm_before") | norm("layernorm_after"),
    {f"embeddings.{kind}": (Touch(STREAM, 2),) for kind in ("cls_token", "position_embeddings", "mask_token")}
    | linear("embeddings.patch_embeddings.projection", STREAM, None)
    | norm("layernorm") | linear("pooler.dense", None, STREAM),
    readers=("classifier.",),
    pictures=True,
)  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), DECODER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), BERT),
    "gpt2": GPT2,
    "vit": VIT,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model with this config.json.

    Raises:
        ValueError: none is known; names those that are.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"recipe.align does not know which permutations keep the function of model_type {kind!r}; it "
            f"covers {', '.join(FAMILIES)}. Leave align out"
        )
    return FAMILIES[kind]


def touches_of(family: Family, names: Iterable[str]) -> tuple[dict[str, tuple[Touch, ...]], list[str]]:
    """The axes of every tensor, and the tensors that the family does not know."""
    names = list(names)
    pooled = any(family.place(name)[1] == "pooler.dense.weight" for name in names)
    found = {name: family.touches(name, pooled) for name in names}
    known = {name: touches for name, touches in found.items() if touches is not None}
    return known, [name for name, touches in found.items() if touches is None]
