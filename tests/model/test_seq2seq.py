"""Sequence-to-sequence models: decoder inputs by each model's own rule, and positions that are computed.

Legend: `B` examples, `T` tokens.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trainmerge as tm
from tests.family_settings import BART, T5, WHISPER, WORDS
from tests.model_families import Family
from tests.world import WORDS as TEXT
from tests.world import nudge, write_tokenizer
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint
from trainmerge.data.batch import Batch
from trainmerge.model.forward import forward
from trainmerge.model.fsdp import shard_model
from trainmerge.model.row_shards import local

LED = {
    **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
    "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
}  # fmt: skip
MARIAN = {**BART, "decoder_vocab_size": WORDS}
MODELS: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": T5,
    "LongT5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "PLBartForConditionalGeneration": BART,
    "MvpForConditionalGeneration": BART,
    "PegasusForConditionalGeneration": BART,
    "PegasusXForConditionalGeneration": BART,
    "MarianMTModel": MARIAN,
    "M2M100ForConditionalGeneration": BART,
    "NllbMoeForConditionalGeneration": {**BART, "num_experts": 4},
    "BlenderbotForConditionalGeneration": BART,
    "BlenderbotSmallForConditionalGeneration": BART,
    "LEDForConditionalGeneration": LED,
    "WhisperForConditionalGeneration": WHISPER,
}


def build(kind: str, seed: int = 0) -> nn.Module:
    model = Family(kind, MODELS[kind], dict).build()
    if seed:
        learned = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        nudge(learned, seed)
    return model


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_logits_are_those_of_the_models_own_loss(kind: str) -> None:
    model, generator = build(kind, seed=1), torch.Generator().manual_seed(0)
    labels = torch.randint(5, WORDS, (2, 6), generator=generator)
    labels[0, -1], labels[1, 3:] = 2, torch.tensor([2, 0, 0])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    inputs: dict[str, Tensor] = {"input_features": torch.randn(2, 16, 60, generator=generator)}
    if kind != "WhisperForConditionalGeneration":
        ids = torch.randint(5, WORDS, (2, 8), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = forward(model, Batch(0, {**inputs, "labels": labels}, mask, torch.arange(2)), None).logits
        want = model(**inputs, labels=labels.masked_fill(~mask, -100)).loss
    got = nn.functional.cross_entropy(logits[mask], labels[mask])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


COMPUTED = {
    "MarianMTModel": "weight",
    "PegasusForConditionalGeneration": "weight",
    "M2M100ForConditionalGeneration": "weights",
}
SIDES = ("encoder", "decoder")


def save(kind: str, folder: Path, seed: int, positions: bool) -> None:
    """With or without the positions in the file, as versions of transformers differ in."""
    model = build(kind, seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    state, own = (
        load_file(folder / "model.safetensors"),
        dict(model.named_parameters()) | dict(model.named_buffers()),
    )
    for side in SIDES:
        name = f"model.{side}.embed_positions.{COMPUTED[kind]}"
        state.pop(name, None)
        if positions:
            state[name] = own[name].detach().clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", list(COMPUTED))
@pytest.mark.parametrize(("base", "expert"), [(True, False), (False, True), (False, False)])
def test_files_may_have_or_lack_computed_positions(
    tmp_path: Path, kind: str, base: bool, expert: bool
) -> None:
    save(kind, tmp_path / "base", 0, base)
    save(kind, tmp_path / "a", 1, expert)
    opened = tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "a"))}).open()
    assert not [name for name in opened.task_vectors.deltas if "embed_positions" in name]
    loaded = load_model(opened.base).module
    tm.export_merge(
        opened.base, opened.task_vectors, tm.Coefficients(("a",), opened.layout, 1.0), tmp_path / "m"
    )
    exported = getattr(transformers, kind).from_pretrained(tmp_path / "m")
    for model in (loaded, exported):
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        want = dict(build(kind).named_parameters()) | dict(build(kind).named_buffers())
        for side in SIDES:
            name = f"model.{side}.embed_positions.{COMPUTED[kind]}"
            assert torch.equal(own[name], want[name])


def test_positions_that_were_trained_are_not_taken_for_computed_ones(tmp_path: Path) -> None:
    kind = "MarianMTModel"
    save(kind, tmp_path / "base", 0, positions=False)
    save(kind, tmp_path / "a", 1, positions=True)
    state = load_file(tmp_path / "a/model.safetensors")
    state["model.encoder.embed_positions.weight"] += 0.1
    save_file(state, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_positions\.weight \(64, 32\), which the base lacks"):
        tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "a"))}).open()


@pytest.mark.parametrize("kind", ["MarianMTModel", "M2M100ForConditionalGeneration"])
def test_fit_export_and_perplexity_of_targets(tmp_path: Path, kind: str) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save(kind, tmp_path / name, seed, positions=name != "b")
    rows = [{"text": f"{TEXT[i]} {TEXT[i + 1]}", "target": f"{TEXT[-1 - i]} {TEXT[i]}"} for i in range(6)]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = {n: str(tmp_path / f"{n}.jsonl") for n in "ab"}
    recipe = tm.Recipe(
        str(tmp_path / "base"), {n: tm.Expert(str(tmp_path / n), file[n], file[n]) for n in "ab"}
    )
    module = tm.MergeModule(recipe, tm.Alignment(), workspace=str(tmp_path / "workspace"), initial=[1.0, 0.0])
    columns = tm.Columns(target="target")
    data = tm.Calibration(file, recipe.base, batch_size=2, max_length=8, columns=columns)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    tm.export_run(tmp_path / "run", tmp_path / "merged")
    found = tm.evaluate_run(tmp_path / "run", compare=False)
    expert = build(kind, 1)
    encoded = [data.tokenize.encode([example]) for example in data.examples[0]]
    with torch.no_grad():
        losses = [expert(**e.inputs).loss.item() for e in encoded]
    assert found.scores["learned"]["a"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_a_sharded_model_computes_its_positions_too(tmp_path: Path) -> None:
    save("MarianMTModel", tmp_path / "base", 0, positions=False)
    base = open_checkpoint(tmp_path / "base")
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        loaded = load_meta_model(base)
        shard_model(loaded, base, [], torch.device("cpu"))
        want = dict(build("MarianMTModel").named_parameters())
        for side in SIDES:
            name = f"model.{side}.embed_positions.weight"
            assert torch.equal(local(dict(loaded.module.named_parameters())[name]), want[name])
    finally:
        dist.destroy_process_group()
