"""Mixtures of experts: every tensor of the files is a place in a parameter, from files to files and back.

Legend: `E` experts of a layer, `K` fine-tunes, `G` coefficient groups.
"""

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers.core_model_loading import PermuteForRope, WeightConverter

import trainmerge as tm
from tests.contracts import assert_same_bits, relative_error
from tests.mixture_world import write_picture_mixture
from tests.model_families import FAMILIES, Family
from tests.world import nudge
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint, places
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.export.export import export_merge
from trainmerge.fitting.learned import warn_if_unreached
from trainmerge.model.functional import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.routing import routers_of
from trainmerge.task_vectors.places import is_place, parameter_of, view

PER_EXPERT = (
    "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "DeepSeek-V2", "DeepSeek-V3", "OLMoE clip_qkv",
    "PhiMoE", "GLM-4-MoE", "Jamba",
)  # fmt: skip
FUSED = ("Granite-MoE", "gpt-oss", "Llama 4")
ELEVEN = (
    "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE clip_qkv", "DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE",
    "gpt-oss", "Llama 4", "PhiMoE", "Granite-MoE",
)  # fmt: skip


def write(family: Family, folder: Path, seed: int) -> Path:
    model = family.build()
    nudge(model, seed, 0.02)
    model.save_pretrained(folder)
    return folder


def world(name: str, root: Path) -> tm.Recipe:
    """A base and two fine-tunes of it."""
    for seed, place in enumerate(("base", "a", "b")):
        write(FAMILIES[name], root / place, seed)
    return tm.Recipe(str(root / "base"), {n: tm.Expert(str(root / n)) for n in "ab"})


def files(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", PER_EXPERT + FUSED)
def test_the_model_in_memory_is_transformers_own(name: str, tmp_path: Path) -> None:
    base = open_checkpoint(write(FAMILIES[name], tmp_path / "base", 1))
    loaded = load_model(base)
    own = getattr(transformers, FAMILIES[name].kind).from_pretrained(base.path)
    assert any(is_place(inside) for inside in loaded.names.values()) == (name in PER_EXPERT)
    parts = dict(loaded.module.named_parameters())
    for parameter, want in own.named_parameters():
        assert_same_bits(parts[parameter], want)
    for tensor, inside in loaded.names.items():
        assert_same_bits(view(inside, parts[parameter_of(inside)]), base.read(tensor))
    empty = load_meta_model(base)
    assert empty.names == loaded.names
    assert {n: (p.shape, p.dtype) for n, p in empty.module.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in parts.items()
    }


@pytest.mark.parametrize("name", PER_EXPERT + FUSED)
def test_a_one_hot_merge_writes_the_files_of_that_fine_tune(name: str, tmp_path: Path) -> None:
    opened = world(name, tmp_path).open()
    coefficients = Coefficients(("a", "b"), opened.layout, torch.tensor([[0.0], [1.0]]))
    loaded = load_model(opened.base)
    MergedModel(loaded.module, opened.task_vectors, coefficients, loaded.names).materialise()
    want, parts = files(tmp_path / "b"), dict(loaded.module.named_parameters())
    for tensor, inside in loaded.names.items():
        assert_same_bits(view(inside, parts[parameter_of(inside)]), want[tensor])


@pytest.mark.parametrize("name", ELEVEN)
def test_an_export_of_one_fine_tune_has_its_files(name: str, tmp_path: Path) -> None:
    opened = world(name, tmp_path).open()
    coefficients = Coefficients(("a", "b"), opened.layout, torch.tensor([[0.0], [1.0]]))
    export_merge(opened.base, opened.task_vectors, coefficients, tmp_path / "out")
    made, want = files(tmp_path / "out"), files(tmp_path / "b")
    assert made.keys() == want.keys() == files(tmp_path / "base").keys()
    for tensor, own in want.items():
        assert_same_bits(made[tensor], own)
    kind = getattr(transformers, FAMILIES[name].kind)
    _, found = kind.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("model_type", ["coe", "union_of_experts", "dynamic_moe"])
def test_architectures_that_transformers_does_not_have_are_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    """Chain-of-Experts, Union of Experts, Dynamic-MoE: also as a known type with code of their own."""
    folder = write(FAMILIES["DeepSeek-V2"], tmp_path / "base", 1)
    own = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    config = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"model_type": model_type}, f"model type `{model_type}`"),
        (own, "OwnForCausalLM is in the checkpoint's own code"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=f"config.json: transformers .* cannot build .*{words}"):
            load_meta_model(open_checkpoint(folder))


@pytest.mark.parametrize("grouping", [Grouping(), Grouping(mixture="expert")], ids=["kind", "expert"])
@pytest.mark.parametrize("name", PER_EXPERT + FUSED)
def test_gradients_are_autograds(name: str, grouping: Grouping, tmp_path: Path) -> None:
    opened = world(name, tmp_path).open()
    vectors = opened.task_vectors
    layout = grouping.layout(vectors.shapes)
    start = torch.rand(2, len(layout.labels), generator=torch.Generator().manual_seed(0))
    coefficients = Coefficients(("a", "b"), layout, start).double()
    loaded = load_model(opened.base)
    module = loaded.module.double()
    if name != "Llama 4":  # whose products are plain
        module.set_experts_implementation("eager")  # the grouped products take no float64
    merged = MergedModel(module, vectors, coefficients, loaded.names)
    weights = in_memory(module, loaded.names, merged_weights(vectors, coefficients))
    want_loss = loss(functional_call(module, weights, (), FAMILIES[name].inputs()))
    (want,) = torch.autograd.grad(want_loss, coefficients.raw)
    merged.materialise()
    loss(merged.module(**FAMILIES[name].inputs())).backward()
    assert relative_error(merged.gradient(), want) < 1e-6
    assert all(parameter.grad is None for parameter in module.parameters())


def in_memory(module: nn.Module, names: dict[str, str], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the files as the module's parameters, inside the graph."""
    found = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for tensor, weight in weights.items():
        inside = names[tensor]
        view(inside, found[parameter_of(inside)]).copy_(weight)
    return found


def loss(outputs: object) -> Tensor:
    logits: Tensor = outputs.logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return (logits * weights).sum() + (logits.tanh() * weights).mean()


def test_experts_of_two_dtypes_are_held_in_the_wider_one(tmp_path: Path) -> None:
    folder = write(FAMILIES["Mixtral"], tmp_path / "base", 1)
    tensors = files(folder)
    narrow = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors[narrow] = tensors[narrow].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(open_checkpoint(folder))
    parts = dict(loaded.module.named_parameters())
    for tensor, inside in loaded.names.items():
        assert_same_bits(view(inside, parts[parameter_of(inside)]), tensors[tensor].float())


def test_a_file_without_one_experts_matrix_is_refused(tmp_path: Path) -> None:
    folder = write(FAMILIES["Qwen3-MoE"], tmp_path / "base", 1)
    tensors = files(folder)
    tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not fill 1 .*layers\.1\.mlp\.experts\.gate_up"):
        load_model(open_checkpoint(folder))


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write(FAMILIES["Mixtral"], tmp_path / "base", 1)
    tensors = files(folder)
    wrong = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    tensors[wrong] = tensors[wrong][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.3\.w2\.weight is .*makes it"):
        load_model(open_checkpoint(folder))


def test_adapters_of_the_experts_stacks_are_merged_as_peft_does(tmp_path: Path) -> None:
    base = write(FAMILIES["Qwen3-MoE"], tmp_path / "base", 1)
    kind = getattr(transformers, FAMILIES["Qwen3-MoE"].kind)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    adapted = get_peft_model(kind.from_pretrained(base), config)
    nudge(adapted, 5)
    adapted.save_pretrained(tmp_path / "low")
    whole = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "low").merge_and_unload()
    want = dict(whole.named_parameters())
    opened = tm.Recipe(str(base), {"low": tm.Expert(str(tmp_path / "low"))}).open(tmp_path / "workspace")
    loaded = load_model(opened.base)
    MergedModel(
        loaded.module, opened.task_vectors, Coefficients(("low",), opened.layout, 1.0), loaded.names
    ).materialise()
    assert sum("experts" in name for name in opened.task_vectors.deltas) == 24
    for name, parameter in loaded.module.named_parameters():
        assert_same_bits(parameter, want[name])


def test_the_base_keeps_its_router_biases_and_says_so(tmp_path: Path) -> None:
    recipe = world("DeepSeek-V3", tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = files(tmp_path / "b")
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"expert b has router biases of its own, .*e_score_correction_bias"):
        opened = recipe.open()
    assert name not in opened.task_vectors.deltas


def test_experts_that_no_token_reached_are_known(tmp_path: Path) -> None:
    opened = world("Qwen3-MoE", tmp_path).open()
    layout = Grouping(mixture="expert").layout(opened.task_vectors.shapes)
    loaded = load_model(opened.base)
    merged = MergedModel(loaded.module, opened.task_vectors, Coefficients(("a", "b"), layout), loaded.names)
    merged.materialise()
    chosen: set[tuple[int, int]] = set()
    for i, layer in enumerate(loaded.module.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda _, __, out, i=i: chosen.update((i, int(e)) for e in out[2].flatten())
        )
    loss(loaded.module(input_ids=torch.tensor([[3, 4]]))).backward()
    slopes = merged.gradient()
    kinds = ("gate_proj", "up_proj", "down_proj")
    want = {f"model.layers.{i}.mlp.experts.{e}.{kind}.weight" for i, e in chosen for kind in kinds}
    assert merged.reached == want
    assert len(want) < 24
    lost = [g for name, (g,) in layout.groups.items() if ".experts." in name and name not in want]
    assert not slopes[:, lost].any()
    with pytest.warns(UserWarning, match=rf"{len(lost)} of 24 matrices .* {len(lost)} keep their start"):
        warn_if_unreached(merged)


def test_stacks_that_the_hub_has_transposed_are_merged_as_they_lie(tmp_path: Path) -> None:
    for seed, place in enumerate(("base", "a")):
        model = write_picture_mixture(tmp_path, place, seed)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert files(tmp_path / "a")[name].shape == (4, 16, 24)
    opened = tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "a"))}).open()
    loaded = load_model(opened.base)
    assert loaded.names[name] == f"{name}[:].T"
    assert opened.task_vectors.deltas[name].role == "transposed"
    coefficients = Coefficients(("a",), opened.layout, 1.0)
    MergedModel(loaded.module, opened.task_vectors, coefficients, loaded.names).materialise()
    for parameter, want in model.named_parameters():
        assert_same_bits(dict(loaded.module.named_parameters())[parameter], want)


def test_rows_that_transformers_would_permute_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(FAMILIES["Llama"], tmp_path, 1)
    rope = WeightConverter(r"q_proj\.weight", "q_proj.weight", [PermuteForRope()])  # name and shape stay
    monkeypatch.setattr(places, "get_model_conversion_mapping", lambda _: [rope])
    with pytest.raises(ValueError, match=r"2 tensors .* no parameter for: .*layers\.0\.self_attn\.q_proj"):
        load_model(open_checkpoint(folder))


def test_adapters_of_single_experts_are_refused_with_a_remedy(tmp_path: Path) -> None:
    base = write(FAMILIES["Qwen3-MoE"], tmp_path / "base", 1)
    LoraConfig(r=2, target_modules=["up_proj"]).save_pretrained(tmp_path / "low")
    module = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, tmp_path / "low" / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 mismatch .*\n.*up_proj\.lora_A.* single experts.*merge the adapter"
    ):
        tm.Recipe(str(base), {"low": tm.Expert(str(tmp_path / "low"))}).open(tmp_path / "workspace")


def test_experts_in_stacks_and_one_by_one_are_told_apart(tmp_path: Path) -> None:
    base = write(FAMILIES["Qwen3-MoE"], tmp_path / "base", 1)
    model = getattr(transformers, FAMILIES["Qwen3-MoE"].kind).from_pretrained(base)
    model.save_pretrained(tmp_path / "stacks", save_original_format=False)
    for one, other in ((base, tmp_path / "stacks"), (tmp_path / "stacks", base)):
        with pytest.raises(
            ValueError, match=r"a matrix per expert and the other stacks of all, load both"
        ) as e:
            tm.Recipe(str(one), {"a": tm.Expert(str(other))}).open()
        assert "a task's head" not in str(e.value)


@pytest.mark.parametrize("stale", ["num_local_experts", "num_experts"])
def test_two_numbers_of_experts(stale: str, tmp_path: Path) -> None:
    """transformers takes `num_local_experts`; published files say `num_experts`."""
    base = write(FAMILIES["Qwen3-MoE"], tmp_path / "base", 1)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"num_experts": 4, "num_local_experts": 4, stale: 8})
    )
    if stale == "num_local_experts":
        with pytest.raises(
            ValueError, match=r"num_local_experts 8 and num_experts 4, .* remove the one that"
        ):
            load_model(open_checkpoint(base))
    else:
        load_model(open_checkpoint(base))


@pytest.mark.parametrize("form", ["low-rank", "shards", "float16"])
def test_other_fine_tunes_of_a_mixture_with_dense_layers(form: str, tmp_path: Path) -> None:
    """An adapter of attention and experts, more files than the base has, and half precision."""
    recipe = world("DeepSeek-V3", tmp_path)
    kind = getattr(transformers, FAMILIES["DeepSeek-V3"].kind)
    tuned = tmp_path / "tuned"
    if form == "low-rank":
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=2, target_modules=["q_b_proj", "kv_b_proj"], target_parameters=targets)
        adapted = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
        nudge(adapted, 5)
        adapted.save_pretrained(tuned)
        want = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tuned).merge_and_unload()
    else:
        half = [kind.from_pretrained(tmp_path / n) for n in ("base", "b")]
        base, want = (model.half() if form == "float16" else model for model in half)
        base.save_pretrained(tmp_path / "base")
        want.save_pretrained(tuned, max_shard_size="20KB" if form == "shards" else "1GB")
    experts = {"tuned": tm.Expert(str(tuned))} | ({"a": recipe.experts["a"]} if form != "float16" else {})
    opened = tm.Recipe(str(tmp_path / "base"), experts).open(tmp_path / "workspace")
    chosen = torch.tensor([[1.0], [0.0]])[: len(experts)]
    coefficients = Coefficients(tuple(experts), opened.layout, chosen)
    export_merge(opened.base, opened.task_vectors, coefficients, tmp_path / "out")
    _, found = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want.save_pretrained(tmp_path / "whole")
    made, own = files(tmp_path / "out"), files(tmp_path / "whole")
    assert made.keys() == own.keys()
    for name, tensor in own.items():
        assert_same_bits(made[name], tensor)


ROUTERS = {  # the patterns of the page of mixtures
    "*.block_sparse_moe.gate.weight": {"Mixtral", "PhiMoE"},
    "*.block_sparse_moe.router.layer.weight": {"Granite-MoE"},
    "*.mlp.gate.weight": {
        "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "OLMoE clip_qkv", "DeepSeek-V2", "DeepSeek-V3", "GLM-4-MoE"
    },
    "*.mlp.router.*": {"gpt-oss"},
    "*.feed_forward.router.weight": {"Llama 4", "Jamba"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "name"), [(pattern, name) for pattern, names in ROUTERS.items() for name in sorted(names)]
)
def test_a_pattern_keeps_the_bases_routers_and_nothing_else(pattern: str, name: str, tmp_path: Path) -> None:
    assert f"`{pattern}`" in Path("notebooks/docs/mixtures.md").read_text()
    base = open_checkpoint(write(FAMILIES[name], tmp_path / "base", 1))
    loaded = load_meta_model(base)
    routers = {
        file
        for file, inside in loaded.names.items()
        if inside.rpartition(".")[0] in routers_of(loaded.module)
    }
    assert routers
    assert routers == {file for file in loaded.names if fnmatch(file, pattern)}
