"""Routers of every family: found, read, and told apart by their scores."""

import pytest
import torch

from tests.model_families import FAMILIES
from tests.world import nudge
from trainmerge.model.routing import RouterChoice, has_sigmoid_scores, routers_of, watching_routers

SIGMOID = {"DeepSeek-V3", "GLM-4-MoE", "Llama 4"}
SOFTMAX = {
    "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "DeepSeek-V2", "OLMoE clip_qkv", "PhiMoE", "Jamba",
    "Granite-MoE", "gpt-oss",
}  # fmt: skip
SPARSE = {
    "Jamba": 1,
    "Llama 4": 1,
    "DeepSeek-V2": 1,
    "DeepSeek-V3": 1,
    "GLM-4-MoE": 1,
}  # of two layers; others have two


@pytest.mark.parametrize("name", sorted(SIGMOID | SOFTMAX))
def test_routers_say_what_they_read_and_choose(name: str) -> None:
    model = FAMILIES[name].build()
    nudge(model, 1, 0.2)
    routers, seen = routers_of(model), dict[str, RouterChoice]()
    assert len(routers) == SPARSE.get(name, 2)
    with watching_routers(routers, seen.__setitem__), torch.no_grad():
        model(**FAMILIES[name].inputs())
    tokens = FAMILIES[name].inputs()["input_ids"].numel()
    for key, router in routers.items():
        states, logits, weights, experts = seen[key]
        bias = getattr(router, "bias", None)
        torch.testing.assert_close(logits, states @ router.weight.T + (0 if bias is None else bias))
        assert logits.shape == (tokens, 4)
        assert weights.shape == experts.shape == (tokens, router.top_k)
        assert bool((weights > 0).all())
        assert has_sigmoid_scores(router) == (name in SIGMOID)


def test_dense_models_have_none() -> None:
    assert routers_of(FAMILIES["Llama"].build()) == {}
