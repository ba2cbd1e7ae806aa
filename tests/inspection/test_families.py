"""inspect and plan on models of many kinds: what cannot be checked is one line, the rest is printed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.world import WORDS, nudge, write_tokenizer
from trainmerge.cli import main
from trainmerge.inspection.fence import attempt, fenced
from trainmerge.inspection.findings import Finding

SIZE = len(WORDS) + 2
SMALL = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 48}  # fmt: skip
PICTURES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def llava() -> PreTrainedModel:
    """Its vision tower has four heads of eight, its text model two of sixteen."""
    vision = CLIPVisionConfig(**PICTURES, num_attention_heads=4)
    text = LlamaConfig(**SMALL, num_key_value_heads=1)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=1)
    )


def t5() -> PreTrainedModel:
    small = {"vocab_size": SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))


def m2m() -> PreTrainedModel:
    """Its class has no method that shifts the labels."""
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder")
             for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    return M2M100ForConditionalGeneration(
        M2M100Config(vocab_size=SIZE, d_model=32, max_position_embeddings=32, **sides)
    )


def swin() -> PreTrainedModel:
    """A number of heads per stage."""
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    )


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {  # whether a plan is possible
    "llava": (llava, True),
    "t5": (t5, True),
    "m2m100": (m2m, True),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)), True),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**PICTURES, num_attention_heads=2)), False),
    "swin": (swin, False),
    "answers": (lambda: BertForQuestionAnswering(BertConfig(**SMALL)), False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, planned = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    nudge(model, 1)
    model.save_pretrained(tmp_path / "a")
    rows = [{"text": f"{word} cat", "target": f"{word} dog"} for word in WORDS[:8]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "recipe": {
            "base": str(tmp_path / "base"),
            "experts": {"a": {"path": str(tmp_path / "a"), "calibration": str(tmp_path / "a.jsonl")}},
        },
        "data": {"batch_size": 2, "max_length": 8, "columns": {"target": "target"}},
        "trainer": {"max_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    assert main(["inspect", str(tmp_path / "config.yaml")]) == (0 if planned else 1)  # a fit refuses it
    out = capsys.readouterr().out
    assert "norm / base" in out  # the geometry, whatever else cannot be said
    assert "could not be checked" not in out
    assert ("peak per device" in out) == planned, out[-600:]
    assert "no plan of memory and time: " not in out
    assert ("error" in out) == (not planned)
    assert out.rstrip().splitlines()[-1].startswith("--suggest FILE.yaml writes")
    planned |= name in ("vit", "swin")  # they take no texts, but a plan from config.json alone takes pictures
    code = main(["plan", str(tmp_path / "base"), "2", "--length", "8"])
    assert (code == 0) == planned
    assert planned or "cannot be dry-run" in capsys.readouterr().err


def test_a_fence_tells_what_failed_and_keeps_the_rest() -> None:
    def check() -> list[Finding]:
        raise RuntimeError("size 8\nagainst 16")

    (found,) = fenced("attention", check)
    assert found.what == "attention could not be checked: RuntimeError: size 8 against 16"
    assert attempt("sizes", lambda: 3) == (3, [])
