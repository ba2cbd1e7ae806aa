"""Adapters as terms equal peft's own `merge_and_unload`, whatever the adapter is."""

import json
import os
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import trainmerge as tm
from tests.bounds import assert_within
from tests.contracts import merge_bound
from tests.opening import open_task_vectors
from trainmerge.checkpoints import open_checkpoint
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.kernels import ExpertWeight, LowRank
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term

SIZES = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
ATTENTION = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=16, **tokens)
        )
    if kind == "bert":
        return BertModel(BertConfig(**SIZES, max_position_embeddings=16))
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    with quiet():
        for kind in ("bert", "llama", "tied", "gpt2"):
            build(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("bert", "llama", "tied", "gpt2")}


def train(base: Path, out: Path, config: peft.PeftConfig, kind: type[nn.Module] | None = None) -> Path:
    """An adapter with random weights everywhere that training would move them."""
    with quiet():
        model = get_peft_model(load(base, kind), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
    return out


def load(base: Path, kind: type[nn.Module] | None = None) -> nn.Module:
    with quiet():
        names = json.loads((base / "config.json").read_text())["architectures"]
        return (kind or globals()[names[0]]).from_pretrained(base)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with quiet():
        merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def weights(base: Path, task_vectors: TaskVectors, expert: int = 0) -> dict[str, torch.Tensor]:
    tensors = dict(load_file(base / "model.safetensors"))
    for name, delta in task_vectors.deltas.items():
        term = delta.terms[expert]
        exact = isinstance(term, ExpertWeight)
        tensors[name] = term.weight if exact else delta.base + dense_term(term, delta.base)
    return tensors


LOW_RANK = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", ["bert", "llama", "tied", "gpt2"])
@pytest.mark.parametrize("options", LOW_RANK.values(), ids=LOW_RANK.keys())
def test_low_rank_adapters_equal_peft(
    bases: dict[str, Path], tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    targets = ATTENTION.get(kind, ATTENTION["llama"])
    adapter = train(
        bases[kind], tmp_path / "a", LoraConfig(r=3, lora_alpha=7, target_modules=targets, **options)
    )
    opened = open_task_vectors(open_checkpoint(bases[kind]), {"a": adapter})
    assert opened.deltas
    assert all(isinstance(delta.terms[0], LowRank) for delta in opened.deltas.values())
    compare(bases[kind], opened, adapter)


def adapter_bound(delta: Delta) -> torch.Tensor:
    """How far two sums of base and adapter may be apart."""
    return 2 * merge_bound(delta, torch.ones(len(delta.terms), 1))


def compare(base: Path, opened: TaskVectors, adapter: Path, *, exact: bool = False) -> None:
    got, want = weights(base, opened), merged_by_peft(base, adapter)
    assert got.keys() == want.keys()
    changed = 0
    for name, tensor in want.items():
        if exact or name not in opened.deltas:
            assert torch.equal(got[name], tensor), name
        else:
            assert_within(got[name], tensor, adapter_bound(opened.deltas[name]))
        changed += not torch.equal(tensor, load_file(base / "model.safetensors")[name])
    assert changed == len(opened.deltas)


def test_rank_and_alpha_patterns_equal_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 3}}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION["llama"], **patterns)
    adapter = train(bases["llama"], tmp_path / "a", config)
    opened = open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter})
    compare(bases["llama"], opened, adapter)


@pytest.mark.parametrize(("kind", "module"), [("llama", "embed_tokens"), ("llama", "lm_head")])
def test_embedding_adapters_equal_peft(
    bases: dict[str, Path], tmp_path: Path, kind: str, module: str
) -> None:
    adapter = train(bases[kind], tmp_path / "a", LoraConfig(r=2, target_modules=[module]))
    opened = open_task_vectors(open_checkpoint(bases[kind]), {"a": adapter})
    assert [type(delta.terms[0]) for delta in opened.deltas.values()] == [LowRank]
    compare(bases[kind], opened, adapter)


@pytest.fixture(autouse=True)
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restored after each test: peft's BOFT leaves CC and CXX changed."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)


DENSE = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]),
    "olora": LoraConfig(r=2, init_lora_weights="olora", target_modules=["q_proj"]),
    "lora_bias": LoraConfig(r=2, lora_bias=True, target_modules=["query"]),
    "bias": LoraConfig(r=2, bias="all", target_modules=["query"]),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "trainable tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]),
    "target_parameters": LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("name", DENSE)
def test_other_adapters_equal_peft_exactly(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    kind = {"lora_bias": "bert", "bias": "bert"}.get(name, "llama")
    adapter = train(bases[kind], tmp_path / "a", DENSE[name])
    base = open_checkpoint(bases[kind])
    with pytest.raises(ValueError, match="set a workspace folder"):
        open_task_vectors(base, {"a": adapter})
    opened = open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    compare(bases[kind], opened, adapter, exact=True)
    (written,) = (tmp_path / "w").iterdir()
    before = written.stat().st_mtime_ns
    open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()] == [before]  # reused


def test_an_embedding_that_is_not_the_bases_goes_dense(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["embed_tokens"]))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 0.5
    save_file(tensors, file)
    base = open_checkpoint(bases["llama"])
    with pytest.raises(ValueError, match="its embedding differs from the base's"):
        open_task_vectors(base, {"a": adapter})
    opened = open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    compare(bases["llama"], opened, adapter, exact=True)


def test_an_adapter_of_integers_or_of_nothing_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    file, base = adapter / "adapter_model.safetensors", open_checkpoint(bases["llama"])
    tensors = load_file(file)
    first = next(iter(tensors))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({**tensors, first: tensors[first].to(dtype)}, file)
        with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {first} is {dtype}: quantised"):
            open_task_vectors(base, {"a": adapter})
    save_file({}, file)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no tensors in it"):
        open_task_vectors(base, {"a": adapter})


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["low rank", "dense"])
def test_a_classifiers_adapter_on_a_headless_base(
    bases: dict[str, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], **options)
    adapter = train(bases["bert"], tmp_path / "a", config, BertForSequenceClassification)
    base = open_checkpoint(bases["bert"])
    opened = open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")  # the head is its own
    ignored = open_task_vectors(base, {"a": adapter}, ignore=["classifier.*"], workspace=tmp_path / "w")
    assert opened.deltas.keys() == ignored.deltas.keys()
    with quiet():
        full = PeftModel.from_pretrained(load(bases["bert"], BertForSequenceClassification), adapter)
        want = {name: p.detach() for name, p in full.merge_and_unload().bert.named_parameters()}
    got = weights(bases["bert"], opened)
    assert len(opened.deltas) == 2
    for name, tensor in want.items():
        bound = adapter_bound(opened.deltas[name]) if name in opened.deltas else 0.0
        assert_within(got[name], tensor, bound)


def test_adapters_and_full_experts_mix(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load(bases["llama"])
    nn.init.normal_(model.model.norm.weight)
    with quiet():
        model.save_pretrained(tmp_path / "full")
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    opened = open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter, "b": tmp_path / "full"})
    assert opened.experts == ("a", "b")
    query = opened.deltas["model.layers.0.self_attn.q_proj.weight"]
    assert [type(term).__name__ for term in query.terms] == ["LowRank", "ExpertWeight"]
    norm = opened.deltas["model.norm.weight"]
    assert [type(term).__name__ for term in norm.terms] == ["Untouched", "ExpertWeight"]
    assert torch.equal(norm.terms[1].weight, model.model.norm.weight)


def edit_config(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_unknown_fields_and_kinds_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    base = open_checkpoint(bases["llama"])
    edit_config(adapter, enable_lora=None)  # off, from an old peft
    assert len(open_task_vectors(base, {"a": adapter}).deltas) == 2
    edit_config(adapter, use_new_thing=True)
    with pytest.raises(ValueError, match=r"a: .*adapter_config\.json: fields use_new_thing are unknown"):
        open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    edit_config(adapter, use_new_thing=None, peft_type="NEW")
    with pytest.raises(ValueError, match="peft_type 'NEW' is unknown"):
        open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    edit_config(adapter, peft_type="PREFIX_TUNING")
    with pytest.raises(ValueError, match=r"cannot be merged|unknown to the installed peft"):
        open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_adapters_of_another_base_are_one_error(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 32}))
    with quiet():
        wide.save_pretrained(tmp_path / "wide")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    other = train(tmp_path / "wide", tmp_path / "a", config)
    bert = train(bases["bert"], tmp_path / "b", LoraConfig(r=2, target_modules=["query"]))
    short = train(bases["llama"], tmp_path / "c", config)
    tensors = load_file(short / "adapter_model.safetensors")
    gone = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != gone}, short / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="mismatch") as error:
        open_task_vectors(open_checkpoint(bases["llama"]), {"x": other, "y": bert, "z": short})
    message = str(error.value)
    assert "x: " in message
    assert "lora_A.weight is (2, 32), this base needs (2, 16)" in message
    assert "y: " in message
    assert "of a module that the base lacks" in message
    assert f"{gone.removeprefix('base_model.model.')} (2, 16) is missing" in message


def test_pickled_adapters_need_permission(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    base = open_checkpoint(bases["llama"])
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*allow_pickle"):
        open_task_vectors(base, {"a": adapter})
    with warnings.catch_warnings():
        opened = open_task_vectors(base, {"a": adapter}, allow_pickle=True)
    compare(bases["llama"], opened, adapter)


@pytest.mark.parametrize("changes", [{"alora_invocation_tokens": [1]}, {"ensure_weight_tying": True}])
def test_a_setting_that_may_not_be_linear_never_goes_low_rank(
    bases: dict[str, Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    edit_config(adapter, **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .* not plainly low-rank"):
        open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter})


def test_what_peft_cannot_merge_is_an_error_and_writes_nothing(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = train(bases["tied"], tmp_path / "a", config)
    base = open_checkpoint(bases["tied"])
    with pytest.raises(ValueError, match="changes one of the tied parameters"):
        open_task_vectors(base, {"a": adapter}, workspace=tmp_path / "w")
    assert not (tmp_path / "w").exists()
    tokens = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    adapter = train(bases["llama"], tmp_path / "b", tokens)
    with pytest.raises(ValueError, match=r"peft cannot merge it .*: aLoRA does not support merging"):
        open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter}, workspace=tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []


@pytest.mark.parametrize(("kind", "module"), [("tied", "embed_tokens"), ("tied", "lm_head"), ("gpt2", "wte")])
def test_an_adapter_of_one_tied_parameter_is_refused(
    bases: dict[str, Path], tmp_path: Path, kind: str, module: str
) -> None:
    adapter = train(bases[kind], tmp_path / "a", LoraConfig(r=2, target_modules=[module]))
    with pytest.raises(ValueError, match="changes one of the tied parameters"):
        open_task_vectors(open_checkpoint(bases[kind]), {"a": adapter}, workspace=tmp_path / "w")


OTHERS = {
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "layer norm": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["q_proj"]),
    "randlora": peft.RandLoraConfig(r=2, target_modules=["q_proj"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
}


def test_trainable_tokens_change_both_sides_of_a_tie(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    adapter = train(bases["tied"], tmp_path / "a", config)
    opened = open_task_vectors(open_checkpoint(bases["tied"]), {"a": adapter}, workspace=tmp_path / "w")
    compare(bases["tied"], opened, adapter, exact=True)


@pytest.mark.parametrize(("own", "other"), [("tied", "untied"), ("untied", "tied")])
def test_trainable_tokens_of_a_base_with_other_ties_are_refused_or_named(
    bases: dict[str, Path], tmp_path: Path, own: str, other: str
) -> None:
    both = {"tied": bases["tied"], "untied": tmp_path / "untied"}
    tm.untie(both["tied"], both["untied"])
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    adapter = train(both[own], tmp_path / "a", config)

    def opened(base: str, recorded: str | None) -> list[str]:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": recorded}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            open_task_vectors(open_checkpoint(both[base]), {"a": adapter}, workspace=tmp_path / "w")
        return [str(one.message) for one in said]

    assert opened(own, str(both[own])) == opened(own, f"org/{both[own].name}") == []
    with pytest.raises(ValueError, match=r"its trainable tokens change .* the merge would be another func"):
        opened(other, str(both[own]))
    for recorded in ("org/name", None):
        (said,) = opened(other, recorded)
        assert f"if its own base, {recorded!r}, " in said
        assert ("does not tie" if other == "tied" else "ties") in said.partition("own base")[2]


def test_trainable_tokens_of_embedding_and_head_need_no_tie(bases: dict[str, Path], tmp_path: Path) -> None:
    tokens = {"embed_tokens": [1, 5], "lm_head": [1, 5]}
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    adapter = train(bases["llama"], tmp_path / "a", config)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/name"}))
    opened = open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter}, workspace=tmp_path / "w")
    assert {"model.embed_tokens.weight", "lm_head.weight"} < opened.deltas.keys()


def test_peft_leaves_the_compilers_as_they_are(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = train(bases["llama"], tmp_path / "a", OTHERS["boft"])
    monkeypatch.setenv("CC", "cc")
    monkeypatch.delenv("CXX", raising=False)
    open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter}, workspace=tmp_path / "w")
    assert (os.environ["CC"], os.environ.get("CXX")) == ("cc", None)


@pytest.mark.parametrize("name", OTHERS)
def test_kinds_with_tensors_of_their_own_equal_peft(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    adapter = train(bases["llama"], tmp_path / "a", OTHERS[name])
    opened = open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter}, workspace=tmp_path / "w")
    compare(bases["llama"], opened, adapter, exact=True)


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head"),
        (LoraConfig(r=2, target_modules=["q_proj"]), "layers.1"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5]), "embed_tokens"),
        (peft.LoHaConfig(r=2, target_modules=["q_proj"]), "layers.1"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "layers.1"),
        (peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]), "layers.1"),
    ],
)
def test_everything_that_an_adapter_promises_is_demanded(
    bases: dict[str, Path], tmp_path: Path, config: peft.PeftConfig, lost: str
) -> None:
    file = train(bases["llama"], tmp_path / "a", config) / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(kept, file)
    with pytest.raises(ValueError, match=rf"{lost}.* is missing"):
        open_task_vectors(open_checkpoint(bases["llama"]), {"a": tmp_path / "a"}, workspace=tmp_path / "w")


def test_copies_of_embeddings_count_where_they_differ(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = train(bases["llama"], tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    file = adapter / "adapter_model.safetensors"
    tensors, base = load_file(file), load_file(bases["llama"] / "model.safetensors")
    copy = base["model.embed_tokens.weight"].clone()
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": copy}, file)
    opened = open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter})
    assert "model.embed_tokens.weight" not in opened.deltas
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": copy + 0.5}, file)
    opened = open_task_vectors(open_checkpoint(bases["llama"]), {"a": adapter})
    assert torch.equal(weights(bases["llama"], opened)["model.embed_tokens.weight"], copy + 0.5)
