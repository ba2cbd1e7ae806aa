"""Every family of models, tiny and random: fit, resume, ties, export; transformers reads the same function.

Legend: `B` examples, `T` tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import trainmerge as tm
from tests import bounds
from tests.world import WORDS, nudge, write_tokenizer
from trainmerge.data import pictures as pictures_of_ours
from trainmerge.data.batch import Batch
from trainmerge.run.recipe_files import calibration_files

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
LANGUAGE = {
    "Llama": {"tie_word_embeddings": False},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
}


PLAIN = tm.Columns()


def language(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **LANGUAGE[family])
    kind = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model: PreTrainedModel = kind(config)
    return model


def write_experts(root: Path, build: Callable[[], PreTrainedModel]) -> None:
    """A base and two full experts, each with eight texts."""
    base = build()
    base.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    write_tokenizer(root / "words")  # AutoTokenizer would make Qwen2's own class of it beside its config
    if base.config.is_encoder_decoder:
        base.config.save_pretrained(root / "words")
    for k, name in enumerate("ab"):
        expert = build()
        nudge(expert, k)
        expert.save_pretrained(root / name)
        write_rows(root / f"{name}.jsonl", [{"text": sentence(i + k)} for i in range(8)])


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(2 + i % 6))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(root: Path, **changes: Any) -> tm.Recipe:
    experts = {n: tm.Expert(str(root / n), str(root / f"{n}.jsonl")) for n in "ab"}
    return tm.Recipe(str(root / "base"), experts, **changes)


def fit(root: Path, run: Path, steps: int, columns: tm.Columns = PLAIN, **changes: Any) -> tm.MergeModule:
    merge = recipe(root, **changes)
    module = tm.MergeModule(
        merge, tm.Alignment(hidden=1.0, layers=(1, -1)), workspace=str(run / "workspace"),
        optimizer=lambda c: torch.optim.Adam(c, lr=0.02), keep_better=steps > 2,
    )  # fmt: skip
    data = tm.Calibration(
        calibration_files(merge), str(root / "words"), batch_size=4, max_length=48, columns=columns
    )
    trainer = tm.make_trainer(run, max_steps=steps, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)
    check_export(module, data, run)
    return module


@torch.no_grad()
def check_export(module: tm.MergeModule, data: tm.Calibration, run: Path) -> None:
    """What transformers reads from the exported folder computes what the fit computed."""
    module.load(data)
    module.resident.merged.materialise()
    encoded = data.tokenize.encode(data.examples[0][:4])
    batch = Batch(0, encoded.inputs, encoded.mask, torch.arange(4))
    bounds.aligned(module.resident.merged.module)
    want = module.resident(batch).logits
    folder = tm.export_run(run, run / "merged", overwrite=True)
    kind = type(module.resident.merged.module)
    ours, module.resident.merged.module = (
        module.resident.merged.module,
        bounds.aligned(kind.from_pretrained(folder)),
    )
    got = module.resident(batch).logits
    module.resident.merged.module = ours
    assert torch.equal(got[encoded.mask], want[encoded.mask])


def aligned(run: Path) -> bool:
    losses = json.loads((run / "calibration_loss.json").read_text())
    return bool(losses["end"] < losses["start"])


@pytest.mark.parametrize("family", list(LANGUAGE))
def test_language_models(family: str, tmp_path: Path) -> None:
    write_experts(tmp_path, lambda: language(family))
    whole = fit(tmp_path, tmp_path / "whole", 6)
    assert aligned(tmp_path / "whole")
    for steps in (2, 6):
        parts = fit(tmp_path, tmp_path / "parts", steps)
    assert torch.equal(whole.coefficients(), parts.coefficients())
    tied = whole.resident.merged.module.config.tie_word_embeddings
    assert ("lm_head.weight" in whole.opened.layout.groups) == (not tied) or family == "GPTNeoX"


def bert_for_masked_words() -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def t5(tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    write_experts(tmp_path, bert_for_masked_words)
    fit(tmp_path, tmp_path / "run", 6)
    assert aligned(tmp_path / "run")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["answer", None])
def test_sequence_to_sequence(tied: bool, target: str | None, tmp_path: Path) -> None:
    write_experts(tmp_path, lambda: t5(tied))
    for k, name in enumerate("ab"):
        rows = [{"text": sentence(i + k), "answer": sentence(3 * i + k)} for i in range(8)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    module = fit(tmp_path, tmp_path / "run", 6, tm.Columns(target=target))
    assert aligned(tmp_path / "run")
    rows = len(module.loaded.teachers[0].parts["log_p"])
    assert rows == (sum(len(sentence(3 * i).split()) for i in range(8)) if target else 8)


def test_low_rank_and_full_experts_in_one_merge(tmp_path: Path) -> None:
    write_experts(tmp_path, lambda: language("Llama"))
    adapter = get_peft_model(language("Llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    nudge(adapter, 5)
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    adapter.save_pretrained(tmp_path / "b")
    module = fit(tmp_path, tmp_path / "run", 6)
    assert aligned(tmp_path / "run")
    terms = {type(delta.terms[1]).__name__ for delta in module.opened.task_vectors.deltas.values()}
    assert terms == {"LowRank", "Untouched"}


SPECIALS = ["<start>", "<end>", "<picture>", "<video>"]


def write_picture_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS, *SPECIALS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    for name, token in zip(("vision_start", "vision_end", "image", "video"), SPECIALS, strict=True):
        setattr(fast, f"{name}_token", token)
        setattr(fast, f"{name}_token_id", words[token])
    fast.start_image_token, fast.end_image_token, fast.context_image_token = SPECIALS[:3]
    fast.start_image_token_id, fast.end_image_token_id = words["<start>"], words["<end>"]
    fast.context_image_token_id = words["<picture>"]
    fast.save_pretrained(folder)
    return fast


def qwen2_vl() -> PreTrainedModel:
    torch.manual_seed(0)
    first = 2 + len(WORDS)
    text = {
        **SMALL,
        "vocab_size": first + 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "hidden_size": 16,
        "mlp_ratio": 1,
        "patch_size": 14,
    }
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=first, vision_end_token_id=first + 1,
        image_token_id=first + 2, video_token_id=first + 3, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def internvl() -> PreTrainedModel:
    torch.manual_seed(0)
    first = 2 + len(WORDS)
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": [28, 28], "patch_size": [14, 14], "use_qk_norm": False,
    }  # fmt: skip
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **SMALL, "vocab_size": first + 4}, vision_config=vision,
        image_token_id=first + 2, image_seq_length=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def without_video(kind: type, **settings: Any) -> Any:
    """transformers' processor, but for its video part, which cannot be built without torchvision."""
    checked = transformers.ProcessorMixin.check_argument_for_proper_class
    try:
        transformers.ProcessorMixin.check_argument_for_proper_class = lambda *_: None
        return kind(video_processor=None, **settings)
    finally:
        transformers.ProcessorMixin.check_argument_for_proper_class = checked


def qwen2_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return without_video(transformers.Qwen2VLProcessor, image_processor=pictures, tokenizer=tokenizer)


def internvl_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    pictures = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False)
    return without_video(
        transformers.InternVLProcessor, image_processor=pictures, tokenizer=tokenizer, image_seq_length=1
    )


@pytest.mark.parametrize(
    ("build", "processor", "vision"),
    [(qwen2_vl, qwen2_processor, "visual.*"), (internvl, internvl_processor, "*vision_tower*")],
    ids=["Qwen2-VL", "InternVL"],
)
def test_pictures(
    build: Callable[[], PreTrainedModel],
    processor: Callable[[PreTrainedTokenizerFast], Any],
    vision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_experts(tmp_path, build)
    tokenizer = write_picture_tokenizer(tmp_path / "base")
    monkeypatch.setattr(pictures_of_ours, "load_processor", lambda _: processor(tokenizer))
    holder = "<start><picture><end>" if build is qwen2_vl else "<picture>"
    for k, name in enumerate("ab"):
        rows = []
        for i in range(4):
            Image.new("RGB", (30 + 20 * i, 40), (60 * i, 90 * k, 200)).save(tmp_path / f"{name}{i}.png")
            rows.append({"text": f"{holder} {sentence(i + k)}", "picture": f"{name}{i}.png"})
        write_rows(tmp_path / f"{name}.jsonl", rows)
    columns = tm.Columns(image="picture")
    whole = fit(tmp_path, tmp_path / "all", 6, columns)
    assert aligned(tmp_path / "all")
    towers = [name for name in whole.opened.layout.groups if is_vision(name)]
    assert towers
    found = next(
        p for p in (vision, "model.visual.*", "vision_tower.*", "*visual*") if matches_any(p, towers)
    )
    text = fit(tmp_path, tmp_path / "text", 6, columns, grouping=tm.Grouping(exclude=[found]))
    assert not [name for name in text.opened.layout.groups if is_vision(name)]
    base = build()
    merged = text.resident.merged.module
    pairs = zip(base.named_parameters(), merged.parameters(), strict=True)
    assert all(torch.equal(a, b) for (name, a), b in pairs if "visual" in name or "vision_tower" in name)


def is_vision(name: str) -> bool:
    return "visual" in name or "vision_tower" in name


def matches_any(pattern: str, names: list[str]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for name in names)


def test_a_shared_vocabulary_is_merged_on_request(tmp_path: Path) -> None:
    sizes = {"a": 40, "b": 27}

    def sized(count: int) -> nn.Module:
        model = language("Qwen2")
        model.resize_token_embeddings(count, mean_resizing=False)
        return model

    write_experts(tmp_path, lambda: language("Qwen2"))
    for k, (name, count) in enumerate(sizes.items()):
        expert = sized(count)
        nudge(expert, k)
        expert.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="vocabulary=shared"):
        recipe(tmp_path).open()
    opened = recipe(tmp_path, vocabulary="shared").open()
    delta = opened.task_vectors.deltas["model.embed_tokens.weight"]
    taus = delta.dense()
    experts = [language("Qwen2") for _ in sizes]
    assert taus.shape == (2, 32, 16)
    assert taus[0].any(dim=1).all()
    assert taus[1, :27].any(dim=1).all()
    assert not taus[1, 27:].any()
    fit(tmp_path, tmp_path / "run", 6, vocabulary="shared")
    assert len(experts) == 2


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_experts(tmp_path, lambda: language("Llama"))
    write_tokenizer(tmp_path / "a")
    recipe(tmp_path).open()  # the same one
    file = tmp_path / "a" / "tokenizer.json"
    file.write_text(file.read_text().replace('"good"', '"xyz"').replace('"bad"', '"good"'))
    with pytest.raises(
        ValueError, match=r"tokenizer.json: token 2 is 'xyz', the base's is 'good' \(2 differ\)"
    ):
        recipe(tmp_path).open()
