"""Families of dense models, and the mixture that holds several of one: names of tensors, and settings.

Legend: `N` experts, `H` hidden size, `F` width of a feed-forward network.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FEED_FORWARD = re.compile(r"(.*\blayers\.\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
PLAIN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


@dataclass(frozen=True)
class Mixture:
    """How a family of mixtures names a layer's tensors, below the layer's own name.

    Args:
        model_type: Its type in config.json.
        architecture: The class of its language model.
        block: The module with the router and the experts.
        kinds: The dense layer's matrices -> those of an expert.
        experts: The setting with the number of experts.
        shared: Whether each layer has an expert that every token passes, behind a gate of its own.
    """

    model_type: str
    architecture: str
    block: str
    kinds: Mapping[str, str]
    experts: str
    shared: bool = False

    def router(self, layer: str) -> str:
        """The tensor with one row [H] per expert."""
        return f"{layer}.{self.block}.gate.weight"

    def expert(self, layer: str, number: int, kind: str) -> str:
        """An expert's matrix of a kind (`gate_proj`, `up_proj`, `down_proj`)."""
        return f"{layer}.{self.block}.experts.{number}.{self.kinds[kind]}.weight"

    def settings(self, experts: int, top_k: int, config: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json says that the dense model's does not: `N` experts, `top_k` for each token."""
        found: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            self.experts: experts,
            "num_experts_per_tok": top_k,
            "output_router_logits": False,
        }
        if self.model_type == "mixtral":
            return found
        width = config["intermediate_size"]
        found |= {"moe_intermediate_size": width, "decoder_sparse_step": 1, "mlp_only_layers": []}
        found["norm_topk_prob"] = True
        return found | ({"shared_expert_intermediate_size": width} if self.shared else {})


MIXTRAL = Mixture(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "num_local_experts",
)
QWEN2 = Mixture("qwen2_moe", "Qwen2MoeForCausalLM", "mlp", PLAIN, "num_experts", shared=True)
QWEN3 = Mixture("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", PLAIN, "num_experts")
# Type and class of the dense model -> the mixture whose attention, embeddings and norms are the same.
OF_DENSE = {
    ("llama", "LlamaForCausalLM"): MIXTRAL,
    ("mistral", "MistralForCausalLM"): MIXTRAL,
    ("qwen2", "Qwen2ForCausalLM"): QWEN2,
    ("qwen3", "Qwen3ForCausalLM"): QWEN3,
}


def mixture_of(where: object, config: Mapping[str, Any]) -> Mixture:
    """The mixture that holds several models with this config.json; `where` is their base, for the error.

    Raises:
        ValueError: there is none.
    """
    named = config.get("model_type"), next(iter(config.get("architectures") or ()), None)
    if (found := OF_DENSE.get(named)) is None:  # type: ignore[arg-type]
        able = ", ".join(architecture for _, architecture in OF_DENSE)
        raise ValueError(
            f"{where}: transformers has no mixture with the attention, embeddings and norms of "
            f"{named[1] or named[0]}. Those with one: {able}"
        )
    return found


def feed_forward(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Tensor -> its layer and kind, of the feed-forward matrices among these names.

    >>> feed_forward(["model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
    {'model.layers.3.mlp.up_proj.weight': ('model.layers.3', 'up_proj')}
    """
    found = {name: FEED_FORWARD.fullmatch(name) for name in names}
    return {name: (own[1], own[2]) for name, own in found.items() if own}
