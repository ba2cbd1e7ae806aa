"""A merge as an adapter: peft's logits are the merged checkpoint's, and every error is what it says."""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

import trainmerge as tm
from tests.bounds import aligned
from tests.world import WORDS, bert, llama, nudge, write_tokenizer
from trainmerge.checkpoints import lora_targets, open_checkpoint
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export import adapter_source
from trainmerge.export.adapter import write_adapter
from trainmerge.export.adapter_form import AdapterReport
from trainmerge.export.export import write_checkpoint
from trainmerge.export.export_adapter import AdapterMerge, warn_of_errors
from trainmerge.export.shards import CheckpointMerge
from trainmerge.kernels import Difference
from trainmerge.preprocess import apply_for_one_pass
from trainmerge.run.opened import Opened
from trainmerge.task_vectors.changes import Change

LOGITS = 1e-6  # relative to the largest: rounding of one small model, two ways
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS) + 2, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens)
    )


BUILD = {"llama": llama, "untied": lambda: llama(tied=False), "bert": bert, "gpt2": gpt2}
LORAS = {  # of two experts: other ranks, other modules, other scales
    "llama": [LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
              LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"])],
    "untied": [LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "v_proj"]),
               LoraConfig(r=3, lora_alpha=3, target_modules=["embed_tokens", "lm_head"],
                          rank_pattern={"lm_head": 1})],
    "bert": [LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"]),
             LoraConfig(r=4, lora_alpha=4, target_modules=["query"], layers_to_transform=[1])],
    "gpt2": [LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
             LoraConfig(r=3, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn"])],
}  # fmt: skip


def save(model: torch.nn.Module, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per kind of model: a base, two adapters `a` and `b`, and a full expert `full`."""
    root = tmp_path_factory.mktemp("worlds")
    for kind, build in BUILD.items():
        write_tokenizer(save(build(), root / kind / "base"))
        full = build()
        nudge(full, 5)
        save(full, root / kind / "full")
        for number, config in enumerate(LORAS[kind]):
            with quiet():
                model = get_peft_model(build(), config)
            generator = torch.Generator().manual_seed(number)
            for parameter in (one for one in model.parameters() if one.requires_grad):
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            save(model, root / kind / "ab"[number])
    return root


def recipe(world: Path, experts: str = "ab", **changes: object) -> tm.Recipe:
    paths = {name: world / ("full" if name == "f" else name) for name in experts}
    return tm.Recipe(str(world / "base"), {n: tm.Expert(str(p)) for n, p in paths.items()}, **changes)


def opened_merge(own: tm.Recipe, place: Path) -> tuple[CheckpointMerge, Opened]:
    """The merge with coefficients that all differ."""
    opened = own.open(place)
    count = len(opened.layout.labels) * len(own.experts)
    values = torch.linspace(-0.4, 0.9, count).view(len(own.experts), -1)
    after, rule = apply_for_one_pass(opened.task_vectors, own.preprocess, place, "inputs")
    coefficients = Coefficients(list(own.experts), opened.layout, values)
    return CheckpointMerge(opened.base, after, coefficients, rule), opened


def write(own: tm.Recipe, out: Path, **form: object) -> tuple[list[AdapterReport], CheckpointMerge]:
    """The adapter in `out`, the merged checkpoint in `out`-merged."""
    out.mkdir()
    merge, opened = opened_merge(own, out.with_name(f"{out.name}-workspace"))
    merged = out.with_name(f"{out.name}-merged")
    merged.mkdir()
    write_checkpoint(merge, merged)
    reports, _ = AdapterMerge(merge, opened, own, tm.AdapterForm(**form)).write(out)  # type: ignore[arg-type]
    return reports, merge


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    names = json.loads((folder / "config.json").read_text())["architectures"]
    kinds = {kind.__name__: kind for kind in (BertModel, GPT2LMHeadModel, LlamaForCausalLM)}
    with quiet():
        model: PreTrainedModel = kinds[names[0]].from_pretrained(folder, dtype=dtype).eval()
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(2, 18).view(2, 8)
    return aligned(model)(input_ids=tokens)[0]


def with_adapter(model: PreTrainedModel, adapter: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses or does not know
        found: torch.nn.Module = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        return found.eval()


def assert_same(got: torch.Tensor, want: torch.Tensor, close: float = LOGITS) -> None:
    assert float((got - want).abs().max()) <= close * float(want.abs().max())


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize(
    "grouping", [tm.Grouping("tensor"), tm.Grouping("chunk", chunks=3)], ids=["one", "chunks"]
)
def test_lora_experts_are_one_lora_exactly(
    kind: str, grouping: tm.Grouping, worlds: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (report,), _ = write(recipe(worlds / kind, grouping=grouping), out)
    assert {one.how for one in report.modules.values()} == {"exact"}
    assert report.error < 1e-7
    assert not report.rest
    got, want = logits(with_adapter(load(worlds / kind / "base"), out)), logits(load(tmp_path / "out-merged"))
    assert_same(got, want)
    assert not torch.allclose(logits(load(worlds / kind / "base")), want, atol=1e-3)
    config = json.loads((out / "adapter_config.json").read_text())
    ranks = {name: len(value) for name, value in load_file(out / "adapter_model.safetensors").items()
             if name.endswith(("lora_A.weight", "lora_embedding_A"))}  # fmt: skip
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == set(ranks.values()) - {config["r"]}


def test_the_exact_adapter_in_float64(worlds: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(worlds / "llama" / name, tmp_path / name)
    save(load(tmp_path / "base", torch.float64), tmp_path / "base")
    _, merge = write(recipe(tmp_path, grouping=tm.Grouping("chunk", chunks=2)), tmp_path / "out")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {part.dtype for part in made.values()} == {torch.float64}
    merged = load_file(tmp_path / "out-merged" / "model.safetensors")
    for name, delta in merge.task_vectors.deltas.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        own = made[f"{module}.lora_B.weight"] @ made[f"{module}.lora_A.weight"]
        torch.testing.assert_close(delta.base + own, merged[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_an_adapter_is_an_expert_again(kind: str, worlds: Path, tmp_path: Path) -> None:
    write(recipe(worlds / kind), tmp_path / "out")
    again = tm.Recipe(str(worlds / kind / "base"), {"merge": tm.Expert(str(tmp_path / "out"))}).open()
    one = Coefficients(["merge"], again.layout, 1.0)
    tm.export_merge(again.base, again.task_vectors, one, tmp_path / "again")
    want = load_file(tmp_path / "out-merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-6)


def dense_changes(merge: CheckpointMerge) -> dict[str, torch.Tensor]:
    """merged - base in float64, by the formula."""
    values = merge.coefficients().detach().double()
    found = {}
    for name, delta in merge.task_vectors.deltas.items():
        weights = merge.coefficients.of(name, values)[:, 0]
        taus = tm.Delta(delta.base.double(), delta.terms).dense()
        found[name] = torch.einsum("k,k...->...", weights, taus)
    return found


@pytest.mark.parametrize("experts", ["ab", "f"])
def test_a_smaller_rank_loses_what_float64_singular_values_say(
    experts: str, worlds: Path, tmp_path: Path
) -> None:
    own = recipe(worlds / "llama", experts, grouping=tm.Grouping("tensor"))
    with pytest.warns(UserWarning, match=r"misses .*% of the change.*q_proj|misses .*% of the change"):
        (report,), merge = write_and_warn(own, tmp_path / "out", rank=2, rest="leave")
    square = lost = 0.0
    for name, change in dense_changes(merge).items():
        one = report.modules.get(name.removesuffix(".weight"))
        whole = float(change.square().sum())
        tail = whole
        if one is not None:
            assert one.rank == 2
            tail = float(torch.linalg.svdvals(change)[2:].square().sum())
            assert one.error == pytest.approx((tail / whole) ** 0.5, rel=1e-5, abs=1e-7)
            assert one.how == (
                "SVD" if experts == "f" else "exact" if "down_proj" in name else "recompressed"
            )
        square, lost = square + whole, lost + tail
    assert report.error == pytest.approx((lost / square) ** 0.5, rel=1e-5)


def write_and_warn(own: tm.Recipe, out: Path, **form: object) -> tuple[list[AdapterReport], CheckpointMerge]:
    reports, merge = write(own, out, **form)
    warn_of_errors(reports)
    return reports, merge


def apply_patch(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """As the card says it."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, difference in load_file(file).items():
            parameters[name].copy_(parameters[name].float() + difference)
    return model


@pytest.mark.parametrize("kind", BUILD)
def test_a_full_merge_with_all_its_rank_and_a_patch_is_whole(kind: str, worlds: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embeddings = kind != "untied"
    (report,), _ = write(recipe(worlds / kind, "f"), out, energy=1.0, rest="patch", embeddings=embeddings)
    assert report.patched
    assert report.error < 1e-6
    model = apply_patch(load(worlds / kind / "base"), out / "trainmerge_rest.safetensors")
    assert_same(logits(with_adapter(model, out)), logits(load(tmp_path / "out-merged")), 1e-5)
    with pytest.raises(ValueError, match=r"adapter with a file of further differences, trainmerge_rest"):
        tm.Recipe(str(worlds / kind / "base"), {"x": tm.Expert(str(out))}).open(tmp_path)


@pytest.mark.parametrize(
    "method", [tm.Ties(0.5), tm.Dare(0.4, seed=1), tm.Tsv()], ids=["ties", "dare", "tsv"]
)
def test_a_preprocessed_merge_of_adapters_is_dense(
    method: tm.Preprocess, worlds: Path, tmp_path: Path
) -> None:
    own = recipe(worlds / "llama", preprocess=[method], grouping=tm.Grouping("chunk", chunks=2))
    (report,), _ = write(own, tmp_path / "out", energy=1.0)
    assert {one.how for one in report.modules.values()} == {"SVD"}
    got = logits(with_adapter(load(worlds / "llama" / "base"), tmp_path / "out"))
    assert_same(got, logits(load(tmp_path / "out-merged")), 1e-5)


def test_energy_holds_in_every_module(worlds: Path, tmp_path: Path) -> None:
    own = recipe(worlds / "llama", "f")
    (report,), merge = write(own, tmp_path / "out", energy=0.9, rest="leave")
    assert len({one.rank for one in report.modules.values()}) > 1
    for name, change in dense_changes(merge).items():
        if one := report.modules.get(name.removesuffix(".weight")):
            shares = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
            assert one.rank == int((shares < 0.9).sum()) + 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    with_adapter(load(worlds / "llama" / "base"), tmp_path / "out")


def test_what_no_lora_holds_is_refused_with_its_share(worlds: Path, tmp_path: Path) -> None:
    own = recipe(worlds / "llama", "f")
    with pytest.raises(
        ValueError, match=r"(?s)does not hold.*model.embed_tokens.weight.*% of the change's norm"
    ):
        write(own, tmp_path / "none", rank=4)
    (report,), merge = write(own, tmp_path / "left", rank=4, rest="leave")
    changes = dense_changes(merge)
    rest = {name for name in changes if "norm" in name or "embed" in name}
    assert set(report.rest) == rest
    share = sum(float(changes[n].square().sum()) for n in rest) / sum(
        float(c.square().sum()) for c in changes.values()
    )
    assert report.rest_share == pytest.approx(share)
    assert "left out" in report.summary
    kept = recipe(worlds / "llama", "f", grouping=tm.Grouping(exclude=["*norm*", "*embed*"]))
    (whole,), _ = write(kept, tmp_path / "kept", rank=4)
    assert not whole.rest


def test_a_dense_merge_needs_a_bound_and_an_empty_one_is_refused(worlds: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a --rank, or the share of the squared norm"):
        write(recipe(worlds / "llama", "af"), tmp_path / "out", rest="leave")
    merge, opened = opened_merge(recipe(worlds / "llama"), tmp_path / "w")
    zero = Coefficients(["a", "b"], opened.layout, 0.0)
    nothing = CheckpointMerge(opened.base, merge.task_vectors, zero)
    (tmp_path / "zero").mkdir()
    with pytest.raises(ValueError, match="changes no module that a LoRA can change"):
        AdapterMerge(nothing, opened, recipe(worlds / "llama"), tm.AdapterForm()).write(tmp_path / "zero")


@pytest.mark.parametrize("methods", [[], [tm.Ties(0.5)], [tm.Tsv()]], ids=["raw", "rule", "cached"])
def test_each_expert_on_the_merge(methods: list[tm.Preprocess], worlds: Path, tmp_path: Path) -> None:
    own = recipe(worlds / "llama", preprocess=methods, grouping=tm.Grouping("tensor"))
    out = tmp_path / "out"
    form = {"energy": 1.0, "rest": "leave"} if methods else {}
    out.mkdir()
    merge, opened = opened_merge(own, tmp_path / "w")
    (tmp_path / "merged").mkdir()
    write_checkpoint(merge, tmp_path / "merged")
    reports, files = AdapterMerge(merge, opened, own, tm.AdapterForm(each=True, **form)).write(out)  # type: ignore[arg-type]
    assert [report.place for report in reports] == ["a", "b"]
    assert set(files) == {"a/adapter_model.safetensors", "b/adapter_model.safetensors"}
    for name in "ab":
        expert = with_adapter(load(worlds / "llama" / "base"), worlds / "llama" / name)
        got = with_adapter(load(tmp_path / "merged"), out / name)
        assert_same(logits(got), logits(expert), 1e-5)
    if not methods:  # no more columns than all experts together
        assert max(report.rank for report in reports) == 5


def test_parts_of_an_adapter_in_another_dtype(worlds: Path, tmp_path: Path) -> None:
    (report,), _ = write(recipe(worlds / "llama"), tmp_path / "out", dtype="bfloat16")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {part.dtype for part in made.values()} == {torch.bfloat16}
    assert 1e-4 < report.error < 1e-2  # of rounding alone


def test_what_vllm_reads(worlds: Path, tmp_path: Path) -> None:
    """Its documented fields and names: `PEFTHelper` and `parse_fine_tuned_lora_name`."""
    write(recipe(worlds / "llama", "f"), tmp_path / "out", energy=0.8, rest="leave")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {type(config[key]) for key in ("r", "lora_alpha")} == {int}
    assert config["lora_alpha"] / config["r"] == 1  # the only scale that it knows
    assert config["target_modules"] == sorted(EVERY)
    assert config["bias"] == "none"
    assert not any(config[key] for key in ("modules_to_save", "use_dora", "use_rslora"))
    made: Mapping[str, torch.Tensor] = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, part in made.items():
        first, second, *inner, side, end = name.split(".")
        assert (first, second, end) == ("base_model", "model", "weight")
        assert side in ("lora_A", "lora_B")
        assert inner[-1] in EVERY
        assert part.shape[side == "lora_B"] <= config["r"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_convolution_is_factored_over_its_kernel(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with quiet():
        base = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
        base.save_pretrained(tmp_path / "base")
        nudge(base, 1)
        base.save_pretrained(tmp_path / "full")
    (report,), _ = write(recipe(tmp_path, "f"), tmp_path / "out", energy=1.0, rest="patch")
    assert report.modules["embeddings.patch_embeddings.projection"].rank == 8
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    place = "base_model.model.embeddings.patch_embeddings.projection"
    assert made[f"{place}.lora_A.weight"].shape == (8, 3, 4, 4)
    assert made[f"{place}.lora_B.weight"].shape == (8, 8, 1, 1)
    pictures = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with quiet(), torch.no_grad():
        model = apply_patch(
            ViTModel.from_pretrained(tmp_path / "base"), tmp_path / "out" / "trainmerge_rest.safetensors"
        )
        got = with_adapter(model, tmp_path / "out")(pixel_values=pictures)[0]
        want = ViTModel.from_pretrained(tmp_path / "out-merged").eval()(pixel_values=pictures)[0]
    assert_same(got, want, 1e-5)


def test_layers_after_the_model_are_out_of_reach(worlds: Path, tmp_path: Path) -> None:
    """As sentence-transformers has them: neither an adapter nor a patch of the model changes them."""
    source = adapter_source.AdapterSource(
        open_checkpoint(worlds / "llama" / "base"),
        lora_targets(open_checkpoint(worlds / "llama" / "base")),
        {"2_Dense/linear.weight": Change("2_Dense/linear.weight", one_term(), torch.ones(1, 1))},
    )
    with pytest.raises(ValueError, match=r"2_Dense/linear.weight, of layers after the model"):
        write_adapter(source, tm.AdapterForm(rank=2, rest="patch"), tmp_path)


def one_term() -> tm.Delta:
    return tm.Delta(torch.zeros(3, 2), (Difference(torch.ones(3, 2)),))
