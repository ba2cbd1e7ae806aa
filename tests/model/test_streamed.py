"""A model whose blocks are read as they run."""

from pathlib import Path

import pytest
import torch

from tests.contracts import assert_same_bits
from tests.model_families import FAMILIES
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint
from trainmerge.model.streamed import streamed


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE"])  # tied embeddings; experts in stacks
def test_a_streamed_model_gives_the_same_outputs_and_keeps_one_block(name: str, tmp_path: Path) -> None:
    FAMILIES[name].build().save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    loaded, inputs = load_meta_model(base), FAMILIES[name].inputs()
    seen = []
    for layer in loaded.module.model.layers:
        layer.self_attn.register_forward_hook(
            lambda *_: seen.append(
                [all(not p.is_meta for p in own.parameters()) for own in loaded.module.model.layers]
            )
        )
    with torch.no_grad(), streamed(loaded, base) as module:
        found = module(**inputs).logits
    assert seen == [[True, False], [False, True]]
    assert all(parameter.is_meta for parameter in loaded.module.model.layers.parameters())
    with torch.no_grad():
        assert_same_bits(found, load_model(base).module(**inputs).logits)
