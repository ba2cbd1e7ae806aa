"""Adapters whose tensors have the names that an older transformers gave to the base's modules."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.inspection.test_families import llava
from tests.opening import open_task_vectors
from tests.world import nudge
from trainmerge.checkpoints import open_checkpoint
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.task_vectors.delta import dense_term

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
NOW, THEN = "base_model.model.model.language_model.", "base_model.model.language_model.model."


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LLaVA's language model was `language_model.model`, and is `model.language_model`."""
    with quiet():
        llava().save_pretrained(tmp_path / "base")
        model = get_peft_model(llava(), LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
        nudge(model, 1)
        model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    named = {name.replace(NOW, THEN): tensor for name, tensor in load_file(file).items()}
    assert all(name.startswith(THEN) for name in named)
    save_file(named, file)
    return tmp_path / "adapter"


def test_they_are_the_bases_modules(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    base = open_checkpoint(adapter.parent / "base")
    opened = open_task_vectors(base, {"a": adapter})
    found = {name.split(".")[-2]: delta for name, delta in opened.deltas.items()}
    assert sorted(found) == ["q_proj", "v_proj"]
    for layer, delta in found.items():
        up, down = (
            next(tensor for name, tensor in tensors.items() if f"{layer}.lora_{side}" in name)
            for side in "BA"
        )
        torch.testing.assert_close(dense_term(delta.terms[0], delta.base), 1.5 * up @ down)


def test_a_rank_under_an_old_name_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    ranks = {"language_model.model.layers.0.self_attn.q_proj": 2}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": ranks}))
    with pytest.raises(ValueError, match=r"rank_pattern .*fits no module under its name in this transform"):
        open_task_vectors(open_checkpoint(adapter.parent / "base"), {"a": adapter})
