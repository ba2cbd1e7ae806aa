"""Checkpoint folders: what is read, what is refused, and how experts are laid beside their base."""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.opening import open_task_vectors
from trainmerge.checkpoints import fingerprint, load_model, open_checkpoint, same_weights, verify
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.kernels import ExpertWeight
from trainmerge.system.safetensors_file import sha256

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24}
QUERY = "model.layers.0.self_attn.q_proj.weight"


def llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "attention_dropout": 0.1, **changes}))


def bert(kind: type[PreTrainedModel] = BertModel, seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    return kind(BertConfig(**{**SIZES, "max_position_embeddings": 16, **changes}))


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def save(model: PreTrainedModel, path: Path, shard: str = "50GB") -> Path:
    with quiet():
        model.save_pretrained(path, max_shard_size=shard)
    return path


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a folder's model.safetensors; None takes one out."""
    file = path / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, file, {"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "base")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "sharded", "8KB")


# reading


def test_a_sharded_checkpoint_reads_as_its_model(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    want = llama().state_dict()
    assert len(checkpoint.files) > 2
    assert checkpoint.tensors.keys() == want.keys()
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.tied == {}
    assert [name for names in checkpoint.shards.values() for name in names] == list(checkpoint.tensors)
    for name, tensor in want.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].shape == tensor.shape
        assert name in checkpoint.shards[checkpoint.tensors[name].file]


def test_shards_may_be_links_as_in_the_hubs_cache(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert open_checkpoint(snapshot).tensors


def test_shards_may_be_links_to_anywhere(sharded: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tensors_of(sharded).items()}
    for file in sorted(sharded.glob("*.safetensors")):
        file.rename(tmp_path / f"stored-{file.name}")
        file.symlink_to(tmp_path / f"stored-{file.name}")
    after = tensors_of(sharded)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    file.unlink()
    (tmp_path / "secret").write_text("token=hf_x")
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=rf"{file.name}: not a complete safetensors file") as refused:
        open_checkpoint(sharded)
    assert "hf_x" not in str(refused.value)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_pickled_weights_that_are_a_link_are_refused(base: Path, tmp_path: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), tmp_path / "outside.bin")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a link to .*outside.*copy it there"):
        open_checkpoint(base, allow_pickle=True)


@pytest.mark.parametrize("name", ["config.json", "*.index.json"])
def test_a_link_that_leads_outside_is_refused(sharded: Path, tmp_path: Path, name: str) -> None:
    file = next(sharded.glob(name))
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=rf"{file.name} is a link to .*outside.*copy it there"):
        open_checkpoint(sharded)


def test_pickled_weights_need_permission(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: only pickled weights \(pytorch_model\.bin\).*allow_pickle"):
        open_checkpoint(base)
    checkpoint = open_checkpoint(base, allow_pickle=True)
    assert torch.equal(checkpoint.read(QUERY), llama().state_dict()[QUERY])
    assert torch.equal(load_model(checkpoint).module.get_parameter(QUERY), llama().get_parameter(QUERY))
    (base / "pytorch_model.bin").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: torch cannot load it"):
        open_checkpoint(base, allow_pickle=True)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "C:\\x.safetensors",
        "a\\..\\..\\b.safetensors",
        "x.bin",
    ],
)
def test_an_index_may_not_lead_out_of_its_folder(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], "evil": name})
    with pytest.raises(
        ValueError, match=r"index\.json: .*is not a \.safetensors file inside the folder"
    ) as error:
        open_checkpoint(sharded)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "a/" + "b" * 9000 + ".safetensors"])
def test_a_name_that_no_file_can_have(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], "evil": name})
    with pytest.raises(ValueError, match=r"\.\.\. is not a \.safetensors file inside") as error:
        open_checkpoint(sharded)
    assert len(str(error.value)) < 1000


def test_index_and_shards_must_agree_both_ways(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(names.values()))
    edit_json(index, weight_map={**{k: v for k, v in names.items() if k != QUERY}, "ghost": shards[0]})
    copied = load_file(sharded / shards[1])
    copied["model.norm.weight"] = torch.ones(16)
    save_file(copied, sharded / shards[1])
    with pytest.raises(ValueError, match="the index contradicts its shards") as error:
        open_checkpoint(sharded)
    message = str(error.value)
    assert f"ghost is not in {shards[0]}" in message
    assert f"{QUERY} of {names[QUERY]} is not in the index" in message
    assert re.search(r"model\.norm\.weight is in .* and in ", message)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(gone.name)} is missing, with \d+ tensors"):
        open_checkpoint(sharded)


def test_folders_that_are_no_checkpoints_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"base: no weights: neither model\.safetensors"):
        open_checkpoint(base)
    (base / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        open_checkpoint(base)
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match=r"a folder of weights without config\.json \(weights\.safetensors"):
        open_checkpoint(base)
    (base / "weights.safetensors").rename(base / "model.safetensors")  # half a download, more likely
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        open_checkpoint(base)


# the resident model


@pytest.mark.parametrize("make", [llama, bert, gpt2, lambda: llama(tie_word_embeddings=True)])
def test_the_resident_model_is_the_checkpoint(
    make: Callable[[], PreTrainedModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make().eval()
    path = save(model, tmp_path / "m", "8KB")
    capfd.readouterr()
    loaded = load_model(open_checkpoint(path))
    assert capfd.readouterr() == ("", "")
    assert not loaded.module.training
    parameters = dict(loaded.module.named_parameters())
    assert set(loaded.names.values()) == parameters.keys()
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert all(m.p == 0 for m in loaded.module.modules() if isinstance(m, nn.Dropout))
    ids = torch.arange(8)[None]
    loaded.module.train()  # dropout is off, whatever the mode
    assert torch.equal(loaded.module(ids)[0], model(ids)[0])


def test_the_resident_model_owns_its_weights(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    module = load_model(checkpoint).module
    module.get_parameter(QUERY).data.zero_()
    assert checkpoint.read(QUERY).any()
    kept = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    read = {checkpoint.read(name).untyped_storage().data_ptr() for name in checkpoint.tensors}
    assert not kept & read


def test_weights_keep_the_files_dtypes(base: Path) -> None:
    rewrite(base, **{QUERY: llama().get_parameter(QUERY).data.bfloat16()})
    module = load_model(open_checkpoint(base)).module
    assert module.get_parameter(QUERY).dtype == torch.bfloat16
    assert module.get_parameter("model.norm.weight").dtype == torch.float32


def test_a_file_without_the_models_prefix_and_with_old_names(tmp_path: Path) -> None:
    model = bert(BertForMaskedLM)
    path = save(model, tmp_path / "m")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(old, path / "model.safetensors", {"format": "pt"})
    loaded = load_model(open_checkpoint(path))
    gamma = "bert.embeddings.LayerNorm.gamma"
    assert loaded.names[gamma] == "bert.embeddings.LayerNorm.weight"
    hub = save(gpt2(), tmp_path / "gpt2")
    tensors = load_file(hub / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # a buffer of old files
    save_file(short, hub / "model.safetensors", {"format": "pt"})
    loaded = load_model(open_checkpoint(hub))
    assert loaded.names["wte.weight"] == "transformer.wte.weight"
    opened = open_task_vectors(open_checkpoint(hub), {"new": save(gpt2(1), tmp_path / "new")})
    assert "wte.weight" in opened.deltas
    assert "h.0.attn.bias" not in opened.deltas
    assert torch.equal(opened.deltas["wte.weight"].terms[0].weight, gpt2(1).transformer.wte.weight)


def test_what_the_file_lacks_is_never_random(tmp_path: Path) -> None:
    path = save(bert(), tmp_path / "m")
    rewrite(path, **{"pooler.dense.weight": None, "pooler.dense.bias": None})
    with pytest.raises(
        ValueError,
        match=r"would be randomly initialised: pooler\.dense\.weight, "
        r"pooler\.dense\.bias",
    ):
        load_model(open_checkpoint(path))
    assert load_model(open_checkpoint(path), ignore=["pooler.*"]).module


def test_unknown_architectures_and_remote_code_are_refused(base: Path) -> None:
    edit_json(base / "config.json", model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    (base / "evil.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"config\.json: transformers .* cannot build this model"):
        load_model(open_checkpoint(base))


def test_a_shape_that_the_config_contradicts_is_refused(base: Path) -> None:
    edit_json(base / "config.json", intermediate_size=32)
    with pytest.raises(
        ValueError, match=r"gate_proj\.weight is \(24, 16\), config\.json makes it \(32, 16\)"
    ):
        load_model(open_checkpoint(base))


# experts


def test_experts_are_mapped_under_the_bases_names(base: Path, tmp_path: Path) -> None:
    experts = {"a": save(llama(1), tmp_path / "a", "8KB"), "b": str(save(llama(2), tmp_path / "b"))}
    opened = open_task_vectors(open_checkpoint(base), experts)
    assert opened.experts == ("a", "b")
    assert opened.deltas.keys() == dict(llama().named_parameters()).keys()
    for name, delta in opened.deltas.items():
        assert torch.equal(delta.base, llama().get_parameter(name))
        assert torch.equal(delta.terms[0].weight, llama(1).get_parameter(name))
        assert torch.equal(delta.terms[1].weight, llama(2).get_parameter(name))


def anonymous_memory() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_opening_and_reading_experts_adds_no_memory(tmp_path: Path) -> None:
    big = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 4}
    path = save(llama(**big), tmp_path / "base")
    assert (path / "model.safetensors").stat().st_size > 40 << 20
    shutil.copytree(path, tmp_path / "expert")
    base = open_checkpoint(path)
    open_task_vectors(base, {"a": tmp_path / "expert"})  # imports and caches
    before = anonymous_memory()
    opened = open_task_vectors(open_checkpoint(path), {"a": tmp_path / "expert"})
    for delta in opened.deltas.values():
        delta.base.sum(), delta.terms[0].weight.sum()
    assert anonymous_memory() - before < 16 << 20


def test_every_mismatch_of_every_expert_is_in_one_error(base: Path, tmp_path: Path) -> None:
    shape = save(llama(1), tmp_path / "shape")
    rewrite(shape, **{QUERY: torch.zeros(16, 16)})
    edit_json(shape / "config.json", num_attention_heads=2)
    wide = save(llama(1, intermediate_size=32), tmp_path / "wide")
    short = save(llama(1), tmp_path / "short")
    rewrite(short, **{"model.norm.weight": None, "extra.weight": torch.zeros(3)})
    tokens = save(llama(1, vocab_size=50), tmp_path / "tokens")
    other = save(bert(), tmp_path / "other")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = save(llama(1), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"junk")
    experts = {path.name: path for path in (shape, wide, short, tokens, other, empty, broken)}
    with pytest.raises(ValueError, match=r"\d+ mismatch(es)? between the base") as error:
        open_task_vectors(open_checkpoint(base), experts)
    message = str(error.value)
    for words in (
        "wide: model.layers.0.mlp.gate_proj.weight is (32, 16), the base's",
        "(24, 16)",
        "short: ",
        "extra.weight",
        "tokens: ",
        "vocab_size is 50, the base has 48",
        "model.embed_tokens.weight is (50, 16), the base's model.embed_tokens.weight is (48, 16)",
        "other: ",
        "model_type is 'bert', the base has 'llama'",
        "empty: ",
        "config.json: no such file",
        "broken: ",
        "not a complete safetensors file",
    ):
        assert words in message
    assert "\n  shape: " not in message


def test_a_missing_tensor_is_named(base: Path, tmp_path: Path) -> None:
    short = save(llama(1), tmp_path / "short")
    rewrite(short, **{"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(16,\), which the expert lacks.*ignore=\["):
        open_task_vectors(open_checkpoint(base), {"a": short})
    opened = open_task_vectors(open_checkpoint(base), {"a": short}, ignore=["model.norm.*"])
    assert "model.norm.weight" not in opened.deltas


@pytest.mark.parametrize("headless", ["base", "expert"])
def test_a_head_and_its_prefix_on_one_side(tmp_path: Path, headless: str) -> None:
    plain, full = bert(seed=1), bert(BertForSequenceClassification, seed=2, num_labels=3)
    base, expert = (plain, full) if headless == "base" else (full, plain)
    opened_base = open_checkpoint(save(base, tmp_path / "base"))
    folder = save(expert, tmp_path / "expert")
    opened = open_task_vectors(opened_base, {"a": folder}, ignore=["classifier.*"])
    if headless == "base":  # an expert's own head
        assert open_task_vectors(opened_base, {"a": folder}).deltas.keys() == opened.deltas.keys()
    else:
        with pytest.raises(ValueError, match=r"classifier\.weight \(3, 16\)") as error:
            open_task_vectors(opened_base, {"a": folder})
        assert "ignore=['classifier.*']" in str(error.value)
        assert str(error.value).startswith("1 mismatch between")
    prefix = "bert." if headless == "expert" else ""
    assert opened.deltas.keys() == {prefix + name for name, _ in plain.named_parameters()}
    name = f"{prefix}encoder.layer.0.output.dense.weight"
    own = expert.get_parameter(name.removeprefix("bert.") if headless == "expert" else f"bert.{name}")
    assert torch.equal(opened.deltas[name].terms[0].weight, own)
    shorter = open_task_vectors(opened_base, {"a": folder}, ignore=["classifier.*", f"{prefix}pooler.*"])
    assert opened.deltas.keys() - shorter.deltas.keys() == {
        f"{prefix}pooler.dense.weight",
        f"{prefix}pooler.dense.bias",
    }


def test_integer_buffers_are_never_merged_and_may_be_missing(tmp_path: Path) -> None:
    base, expert = save(bert(), tmp_path / "base"), save(bert(seed=1), tmp_path / "expert")
    rewrite(base, **{"embeddings.position_ids": torch.arange(16)[None]})
    opened = open_task_vectors(open_checkpoint(base), {"a": expert})
    assert "embeddings.position_ids" not in opened.deltas
    assert open_task_vectors(open_checkpoint(expert), {"a": base}).deltas.keys() == opened.deltas.keys()


def test_other_float_dtypes_are_taken_with_a_warning(base: Path, tmp_path: Path) -> None:
    half = save(llama(1).bfloat16(), tmp_path / "half")
    with pytest.warns(UserWarning, match=r"expert a .*torch\.bfloat16 against torch\.float32") as caught:
        opened = open_task_vectors(open_checkpoint(base), {"a": half})
    assert len(caught) == 1
    assert Path(caught[0].filename).name == "test_checkpoints.py"
    assert opened.deltas[QUERY].dense().dtype == torch.float32


def test_quantised_checkpoints_are_refused(base: Path, tmp_path: Path) -> None:
    eight = save(llama(1), tmp_path / "eight")
    rewrite(eight, **{QUERY: llama(1).get_parameter(QUERY).data.to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"a: .*quantised weights \({re.escape(QUERY)}\)"):
        open_task_vectors(open_checkpoint(base), {"a": eight})
    plain = save(llama(1), tmp_path / "plain")
    edit_json(plain / "config.json", quantization_config=None)  # as some tools write it
    assert QUERY in open_task_vectors(open_checkpoint(base), {"a": plain}).deltas
    edit_json(base / "config.json", quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="quantised"):
        open_task_vectors(open_checkpoint(base), {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("side", ["base", "expert"])
def test_a_weight_that_is_no_float_is_named_with_its_file(
    tmp_path: Path, side: str, dtype: torch.dtype
) -> None:
    folders = {"base": save(llama(), tmp_path / "base"), "expert": save(llama(1), tmp_path / "expert")}
    rewrite(folders[side], **{QUERY: llama().get_parameter(QUERY).data.to(dtype)})
    file = re.escape(str(folders[side] / "model.safetensors"))
    with pytest.raises(ValueError, match=rf"{file}: {re.escape(QUERY)} is {dtype}, where .* floats"):
        open_task_vectors(open_checkpoint(folders["base"]), {"a": folders["expert"]})


# ties


def duplicate_head(path: Path, scale: float = 1.0) -> Path:
    head = load_file(path / "model.safetensors")["model.embed_tokens.weight"].clone() * scale
    rewrite(path, **{"lm_head.weight": head})
    return path


def test_tied_weights_have_one_name(tmp_path: Path) -> None:
    base = duplicate_head(save(llama(tie_word_embeddings=True), tmp_path / "base"))
    plain = save(llama(1, tie_word_embeddings=True), tmp_path / "plain")
    twice = duplicate_head(save(llama(2, tie_word_embeddings=True), tmp_path / "twice"))
    checkpoint = open_checkpoint(base)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    opened = open_task_vectors(checkpoint, {"a": plain, "b": twice})
    assert "lm_head.weight" not in opened.deltas
    assert len(opened.deltas["model.embed_tokens.weight"].terms) == 2
    names = load_model(checkpoint).names
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert open_task_vectors(open_checkpoint(plain), {"b": twice}).deltas.keys() == opened.deltas.keys()
    duplicate_head(twice, 2.0)
    with pytest.raises(ValueError, match=r"b: .*lm_head\.weight differ, config\.json ties them"):
        open_task_vectors(checkpoint, {"a": plain, "b": twice})
    duplicate_head(base, 2.0)
    with pytest.raises(ValueError, match=r"base: .*lm_head\.weight differ"):
        open_task_vectors(open_checkpoint(base), {"a": plain})


def test_tied_against_untied_is_refused(base: Path, tmp_path: Path) -> None:
    tied = save(llama(1, tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(
        ValueError, match=r"lm_head\.weight \(48, 16\) is untied, the base ties it to model\.emb"
    ):
        open_task_vectors(open_checkpoint(tied), {"a": base})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight \(48, 16\) is untied in the base, the expert ties"
    ):
        open_task_vectors(open_checkpoint(base), {"a": tied})


# checks on the whole


def test_fingerprints_are_of_every_file_that_a_merge_depends_on(sharded: Path) -> None:
    (sharded / "tokenizer_config.json").write_text("{}")
    marks = fingerprint(sharded)
    edit_json(sharded / "generation_config.json", eos_token_id=7)
    assert fingerprint(sharded) == marks
    (sharded / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    corrected = fingerprint(sharded)
    assert corrected != marks
    assert same_weights(corrected, marks)
    edit_json(sharded / "config.json", rms_norm_eps=0.5)
    assert not same_weights(fingerprint(sharded), marks)
    marks = fingerprint(sharded)
    assert len([name for name in marks if name.endswith(".safetensors")]) > 2
    assert all(mark == sha256(sharded / name) for name, mark in marks.items())
    with pytest.raises(FileNotFoundError, match="nowhere: no weights"):
        fingerprint(sharded / "nowhere")


def test_every_number_that_is_not_finite_is_named(base: Path, tmp_path: Path) -> None:
    good, bad = save(llama(1), tmp_path / "good"), save(llama(2), tmp_path / "bad")
    checkpoint = open_checkpoint(base)
    opened = open_task_vectors(checkpoint, {"good": good})
    folders = {"base": base, "good": good}
    assert verify(checkpoint, opened, folders) == {side: fingerprint(folders[side]) for side in folders}
    broken = llama(2).get_parameter(QUERY).data.clone()
    broken[3, 3] = float("nan")
    rewrite(bad, **{QUERY: broken, "model.norm.weight": torch.eye(1, 16)[0].log()})
    rewrite(base, **{"lm_head.weight": torch.eye(48, 16).log().neg()})  # zeros and +inf
    checkpoint = open_checkpoint(base)
    opened = open_task_vectors(checkpoint, {"good": good, "bad": bad})
    with pytest.raises(ValueError, match="3 tensors are not finite") as error:
        verify(checkpoint, opened, folders | {"bad": bad})
    message = str(error.value)
    assert f"base: lm_head.weight of {base / 'model.safetensors'}" in message
    assert f"bad: {QUERY} of {bad}" in message
    assert f"bad: model.norm.weight of {bad}" in message
    assert "good" not in message.replace(str(tmp_path), "")


def test_transformers_settings_come_back() -> None:
    logger = logging.getLogger("transformers")
    level = logger.level
    with quiet():
        warnings.warn("not seen", stacklevel=1)
    assert logger.level == level
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn("seen", stacklevel=1)


def test_terms_of_full_experts_are_the_files_pages(base: Path, tmp_path: Path) -> None:
    opened = open_task_vectors(open_checkpoint(base), {"a": save(llama(1), tmp_path / "a")})
    terms = [delta.terms[0] for delta in opened.deltas.values()]
    assert all(isinstance(term, ExpertWeight) for term in terms)
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "a" / "model.safetensors") in maps
