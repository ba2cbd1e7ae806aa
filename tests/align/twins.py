"""Tiny models of every covered family, and experts that are the same function in other places."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from trainmerge.align import Anatomy, Pair, anatomy
from trainmerge.align.families import STREAM
from trainmerge.align.unit_map import UnitMap

DECODER = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
    "pad_token_id": 0,
}  # fmt: skip
ENCODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TEXT = {**ENCODER, "vocab_size": 41, "max_position_embeddings": 32}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, attention_bias=True, mlp_bias=True)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER)),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "bert classifier": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**TEXT, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, attn_pdrop=0)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**ENCODER, image_size=8, patch_size=4)),
}


def model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float64, norms and biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = FAMILIES[family]().eval().double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters, tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@torch.no_grad()
def logits(module: PreTrainedModel, tokens: int = 41) -> Tensor:
    """Its outputs on fixed inputs."""
    dice = torch.Generator().manual_seed(7)
    if module.config.model_type == "vit":
        given = {"pixel_values": torch.randn(2, 3, 8, 8, generator=dice, dtype=torch.float64)}
    else:
        given = {"input_ids": torch.randint(1, tokens, (2, 9), generator=dice)}
    return torch.as_tensor(module(**given).logits)


@torch.no_grad()
def change_by(module: PreTrainedModel, state: dict[str, Tensor]) -> float:
    """The relative change of its outputs with these weights; the model is as before afterwards."""
    before, own = logits(module), weights(module)
    for name, parameter in module.named_parameters():
        parameter.copy_(state[name])
    after = logits(module)
    for name, parameter in module.named_parameters():
        parameter.copy_(own[name])
    return float((after - before).norm() / before.norm())


def spaces(module: PreTrainedModel) -> Anatomy:
    return anatomy(module.config.to_dict(), list(weights(module)))


def under(module: PreTrainedModel, maps: dict[str, UnitMap]) -> dict[str, Tensor]:
    """Its weights with units in other places."""
    own = weights(module)
    pair = Pair(spaces(module), own.__getitem__, own.__getitem__, maps)
    return {name: pair.aligned(name).to(own[name].dtype) for name in own}


def shuffles(module: PreTrainedModel, kinds: str, seed: int = 3) -> dict[str, UnitMap]:
    """Random orders: `neurons`, `heads` and `stream`, whichever are in the text."""
    dice = torch.Generator().manual_seed(seed)
    own, state = spaces(module), weights(module)
    H, G = own.heads, own.shared
    size = Pair(own, state.__getitem__, state.__getitem__).units
    maps: dict[str, UnitMap] = {}
    for layer in own.layers:
        if "neurons" in kinds:
            space = f"{layer} neurons"
            maps[space] = UnitMap(torch.randperm(size(space), generator=dice))
        if "heads" in kinds:
            keys = torch.randperm(G, generator=dice)
            queries = torch.cat([key * (H // G) + torch.randperm(H // G, generator=dice) for key in keys])
            maps |= {f"{layer} query": UnitMap(queries), f"{layer} output": UnitMap(queries)}
            maps |= {f"{layer} key": UnitMap(keys), f"{layer} value": UnitMap(keys)}
    if "stream" in kinds:
        maps[STREAM] = UnitMap(torch.randperm(size(STREAM), generator=dice))
    return maps


def locks(
    module: PreTrainedModel, kinds: str, seed: int = 4, free: bool = False, d: int = 4
) -> dict[str, UnitMap]:
    """Random gauges: of `query` with keys, of `value` with outputs. `free`: as without rotary positions."""
    dice = torch.Generator().manual_seed(seed)
    own = spaces(module)
    H, G = own.heads, own.shared
    maps: dict[str, UnitMap] = {}

    def lock(layer: str, left: str, right: str, matrices: Tensor) -> None:
        several = matrices.repeat_interleave(H // G, 0)
        maps[f"{layer} {left}"] = UnitMap(torch.arange(H), several)
        maps[f"{layer} {right}"] = UnitMap(torch.arange(G), torch.linalg.inv(matrices).mT)

    for layer in own.layers:
        noise = torch.randn(G, d, d, generator=dice, dtype=torch.float64)
        if "query" in kinds:
            angle = torch.rand(G, d // 2, generator=dice, dtype=torch.float64) * 6
            size = 0.5 + torch.rand(G, d // 2, generator=dice, dtype=torch.float64)
            cos, sin = torch.diag_embed(size * angle.cos()), torch.diag_embed(size * angle.sin())
            rotary = torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)
            lock(layer, "query", "key", rotary if own.gauges != "any" and not free else noise)
        if "value" in kinds:
            lock(layer, "output", "value", noise)
    return maps
