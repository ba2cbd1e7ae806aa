"""A family of models on disk: base, two full experts, an adapter, and examples of the kind that it reads."""

import json
import math
import wave
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    ASTFeatureExtractor,
    PreTrainedTokenizerFast,
    SequenceFeatureExtractor,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from tests.family_settings import WORDS
from tests.model_families import Family
from tests.world import nudge

SPECIAL = ["[PAD]", "<s>", "</s>", "[UNK]", "[MASK]", "<image>", "<video>", "<vs>", "<ve>", "[CLS]"]
EXAMPLES = 6
SIZE = 0.02  # of the experts' changes
Columns = dict[str, str | None]


def write_family(family: Family, root: Path) -> tuple[list[str], Columns]:
    """Write `base`, `a`, `b`, and `low`, an adapter, where the model has linear layers.

    Returns the experts' names, and the columns of their examples, `NAME.jsonl`.
    """
    inputs = family.inputs()
    for place in ("base", "a", "b"):
        model = _moved(family, "base ab".index(place[-1]))
        # transformers' own files of DINOv2 giant hold two layers in one tensor, which a merge refuses
        model.save_pretrained(root / place, save_original_format=not family.settings.get("use_swiglu_ffn"))
        if "pixel_values" in inputs:
            ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / place)
        if extractor := _extractor(family, inputs):
            extractor.save_pretrained(root / place)
        if "input_ids" in inputs or "decoder_input_ids" in inputs:
            (write_bytes if family.kind.startswith("Qwen2For") else write_words)(root / place)
    experts = ["a", "b", *(["low"] if _write_adapter(family, root / "low") else [])]
    for k, name in enumerate(experts):
        columns = _write_examples(inputs.keys(), root, name, k)
    return experts, columns


def _extractor(family: Family, inputs: Mapping[str, Tensor]) -> SequenceFeatureExtractor | None:
    """The feature extractor of a model that reads sounds: waves, or a spectrogram of the model's length."""
    if "input_features" in inputs:  # Whisper: 16 bins, 60 frames a second
        return WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=266)
    if "input_values" not in inputs:
        return None
    if family.kind.startswith("AST"):
        return ASTFeatureExtractor(max_length=40, num_mel_bins=16)
    return Wav2Vec2FeatureExtractor()


def _moved(family: Family, seed: int) -> nn.Module:
    """The base is moved too, so that no norm is 1 and no bias is 0."""
    model = family.build()
    nudge(model, 99, SIZE)
    if seed:
        nudge(model, seed, SIZE)
    return model


def write_words(folder: Path) -> None:
    """A tokenizer of WORDS words, `w10` to `w99` and the special ones."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _write(tokenizer, folder)


def write_bytes(folder: Path) -> None:
    """A tokenizer of bytes for the same texts: transformers reads every file of Qwen2 as one of bytes."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *"w\u01200123456789", "\u0120w"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u0120", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _write(tokenizer, folder)


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
        bos_token="<s>",
        eos_token="</s>", cls_token="[CLS]", additional_special_tokens=["<image>", "<video>"],
    ).save_pretrained(folder)  # fmt: skip


def _write_adapter(family: Family, folder: Path) -> bool:
    """A LoRA adapter of all linear layers but the last; False where peft finds none."""
    model = _moved(family, 0)
    try:
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    except (ValueError, NotImplementedError):  # no linear layers, or a model that peft does not know
        return False
    nudge(adapted, 7, SIZE)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return True


def _write_examples(inputs: object, root: Path, name: str, k: int) -> Columns:
    """Six examples of one expert: words, pictures or sounds; their columns."""
    kinds = set(inputs)  # type: ignore[call-overload]
    rows: list[dict[str, object]] = []
    for i in range(EXAMPLES):
        row: dict[str, object] = {}
        if kinds & {"input_ids"}:
            row["text"] = " ".join(f"w{10 + (7 * i + (k + 3) * j) % 90}" for j in range(5 + i % 3))
        elif kinds & {"pixel_values"}:
            row["image"] = f"{name}-{i}.png"
            Image.new("RGB", (40, 36), (40 * i, 80 * k, 200)).save(root / f"{name}-{i}.png")
        else:
            row["audio"] = f"{name}-{i}.wav"
            _write_tone(root / f"{name}-{i}.wav", 200 + 90 * i + 30 * k)
        if kinds & {"decoder_input_ids"}:
            row["target"] = " ".join(f"w{10 + (5 * i + (k + 2) * j) % 90}" for j in range(4))
        rows.append(row)
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"text": None, **{column: column for column in rows[0]}}


def _write_tone(path: Path, frequency: float) -> None:
    """A twentieth of a second of a tone, 16 bits at 16 kHz."""
    angles = torch.arange(800) * (2 * math.pi * frequency / 16_000)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((angles.sin() * 12_000).to(torch.int16).numpy().tobytes())
