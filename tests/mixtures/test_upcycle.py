"""Dense experts as one mixture: identities, files that transformers loads, routers, and what is refused.

Legend: `N` experts, `H` hidden size, `R` states.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import trainmerge as tm
from tests.contracts import assert_same_bits, relative_error
from tests.world import languages_recipe, nudge
from trainmerge.checkpoints import translated_config
from trainmerge.cli import main
from trainmerge.data.held_out import split
from trainmerge.mixtures.families import mixture_of
from trainmerge.mixtures.router_rows import accuracy, fit_router_rows
from trainmerge.mixtures.upcycle import export_mixture, verify_mixture

SIZES = {
    "vocab_size": 22, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "Llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}, "MixtralForCausalLM"),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 4}, "MixtralForCausalLM"),
    "Qwen2": ("Qwen2ForCausalLM", {}, "Qwen2MoeForCausalLM"),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, "Qwen3MoeForCausalLM"),
}
DOMAINS = {"a": "abcdefghij", "b": "klmnopqrst"}  # no letter in common, so a router can tell them apart


def write_letters(folder: Path) -> None:
    """A tokenizer of letters that the class of every family reads alike."""
    letters = ["[PAD]", "[UNK]", *"".join(DOMAINS.values())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )


def build(family: str, seed: int | None = None, **changes: object) -> nn.Module:
    kind, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model: nn.Module = cls(cls.config_class(**SIZES, **settings, **changes))
    nudge(model, 7, 0.1)  # norms and biases too
    if seed is not None:
        nudge(model, seed, 0.05)
    return model.eval()


def write_run(root: Path, family: str, alike: bool = False, **changes: object) -> Path:
    """A base, two experts with texts of their own words, and a run of 0 steps. Returns its folder."""
    build(family, **changes).save_pretrained(root / "base")
    write_letters(root / "base")
    for number, (name, letters) in enumerate(DOMAINS.items()):
        build(family, 3 if alike else number, **changes).save_pretrained(root / name)
        dice = torch.Generator().manual_seed(number)
        texts = [
            "".join(letters[i] for i in torch.randint(10, (6 + j % 3,), generator=dice).tolist())
            for j in range(24)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return fit(root, languages_recipe(root), 0.5 if alike else 0.4)


def fit(root: Path, recipe: tm.Recipe, initial: float) -> Path:
    run = root / "run"
    module = tm.MergeModule(recipe, initial=initial, workspace=str(run / "workspace"))
    trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    files = {name: expert.calibration for name, expert in recipe.experts.items() if expert.calibration}
    tm.fit(module, tm.Calibration(files, recipe.base), trainer, run)
    return run


def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The logits of a folder's model, as a function of ids."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(input_ids=ids).logits
        return out

    return logits


@pytest.mark.parametrize(
    ("family", "routed"), [(family, 0.5) for family in FAMILIES] + [("Qwen2", 0.25), ("Qwen2", 1.0)]
)
def test_a_mixture_of_equal_experts_is_the_dense_model(family: str, routed: float, tmp_path: Path) -> None:
    run = write_run(tmp_path, family, alike=True)
    export_mixture(run, tmp_path / "moe", routed=routed)
    ids = torch.arange(2, 18)[None]
    assert relative_error(load(tmp_path / "moe")(ids), load(tmp_path / "a")(ids)) < 2e-5
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family][2]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two Llama experts, `moe` made of it, and its plain export `merged`."""
    root = tmp_path_factory.mktemp("llama")
    run = write_run(root, "Llama")
    assert main(["export", str(run), str(root / "moe"), "--as", "moe", "--shard-size", "40KB"]) == 0
    tm.export_run(run, root / "merged")
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for file in sorted(folder.glob("*.safetensors")) if "trainmerge" not in file.name
            for name, own in load_file(file).items()}  # fmt: skip


def test_experts_are_the_experts_own_networks_and_the_rest_is_the_merge(llama: Path) -> None:
    found, merged = weights(llama / "moe"), weights(llama / "merged")
    assert (llama / "moe" / "model.safetensors.index.json").is_file()
    kinds = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    expected = {name: own for name, own in merged.items() if ".mlp." not in name}
    for number, expert in enumerate("ab"):
        for name, own in weights(llama / expert).items():
            if ".mlp." in name:
                layer, kind = name.split(".mlp.")
                place = f"{layer}.block_sparse_moe.experts.{number}.{kinds[kind.split('.')[0]]}.weight"
                expected[place] = own
    routers = {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)}
    assert found.keys() == expected.keys() | routers
    for name, own in expected.items():
        assert_same_bits(found[name], own)


def test_the_networks_of_adapters_are_those_that_peft_merges(tmp_path: Path) -> None:
    write_run(tmp_path, "Qwen3")
    kind = transformers.Qwen3ForCausalLM
    for number, name in enumerate(DOMAINS):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        adapted = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
        nudge(adapted, number)
        shutil.rmtree(tmp_path / name)
        adapted.save_pretrained(tmp_path / name)
    shutil.rmtree(tmp_path / "run")
    run = fit(tmp_path, languages_recipe(tmp_path), 0.4)
    export_mixture(run, tmp_path / "moe")
    assert verify_mixture(run, tmp_path / "moe")
    found = weights(tmp_path / "moe")
    for number, name in enumerate(DOMAINS):
        model = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / name)
        want = dict(model.merge_and_unload().named_parameters())
        for layer in range(2):
            for part in ("gate_proj", "up_proj", "down_proj"):
                stem = f"model.layers.{layer}.mlp"
                own = found[f"{stem}.experts.{number}.{part}.weight"]
                torch.testing.assert_close(own, want[f"{stem}.{part}.weight"].data)


def test_the_manifest_has_the_divergence_that_transformers_own_models_have(llama: Path) -> None:
    facts = json.loads((llama / "moe" / "trainmerge_manifest.json").read_text())["mixture"]
    words = AutoTokenizer.from_pretrained(llama / "base")
    for row, folder in {"mixture": "moe", "merge": "merged"}.items():
        ours, means = load(llama / folder), []
        for number, expert in enumerate("ab"):
            lines = (llama / f"{expert}.jsonl").read_text().splitlines()
            _, held = split([json.loads(line)["text"] for line in lines], 0.25, 0, number)
            ids = [torch.tensor([words(text).input_ids]) for text in held]
            theirs = load(llama / expert)
            one, other = (torch.cat([of(text)[0] for text in ids]).log_softmax(-1) for of in (theirs, ours))
            means.append(float(kl_div(other, one, reduction="batchmean", log_target=True)))
        assert facts["divergence"][row] == pytest.approx(sum(means) / 2, rel=1e-3)
    assert min(facts["accuracy"].values()) > 0.75  # the two have no letter in common


def test_a_mixture_is_verified_but_not_rebuilt(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, moe = str(llama / "run"), llama / "moe"
    assert main(["export", run, str(moe), "--as", "moe", "--verify"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    for source in (moe, moe / "README.md"):
        with pytest.raises(ValueError, match=r"Export it from its run|export the run again"):
            tm.rebuild(source, llama / "again")
    assert "## Mixture" in (moe / "README.md").read_text()
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    copy = shutil.copytree(moe, llama / "copy")
    file = next(file for file in copy.glob("model*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.1\.w1\.weight \(not merged\) differs in 1 of"):
        verify_mixture(run, copy)


def test_rows_are_the_minimum_of_the_regression() -> None:
    dice = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=dice)
    states = 5 * torch.randn(200, 8, generator=dice) + 3 * torch.eye(3, 8)[labels]
    rows = fit_router_rows(states, labels, 3)
    wide = states.double()
    size = wide.square().mean().sqrt()
    inner = (rows.double() * size).requires_grad_(True)
    counts = torch.bincount(labels, minlength=3).double()
    loss = cross_entropy(wide / size @ inner.T, labels, 1 / counts) + 1e-3 / 2 * inner.square().sum()
    (slope,) = torch.autograd.grad(loss, inner)
    assert slope.abs().max() < 1e-4
    assert rows.sum(0).abs().max() < 1e-4 * rows.abs().max()
    assert accuracy(torch.eye(3, 8), torch.eye(3, 8)[labels], labels) == 1


@pytest.mark.parametrize(
    ("changes", "top_k", "words"),
    [
        ({}, 3, "2 experts: a mixture needs two or more, and --top-k"),
        ({"attention_bias": True}, 2, r"no parameter for: .*q_proj\.bias"),
    ],
    ids=["top_k", "bias"],
)
def test_what_a_mixture_cannot_hold_is_refused_before_work(
    changes: dict[str, object], top_k: int, words: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path, "Llama", **changes)
    with pytest.raises(ValueError, match=words):
        export_mixture(run, tmp_path / "moe", top_k)
    assert not (tmp_path / "moe").exists()


def test_experts_without_texts_and_other_families_are_refused(llama: Path, tmp_path: Path) -> None:
    recipe = languages_recipe(llama)
    silent = replace(recipe, experts={n: replace(e, calibration=None) for n, e in recipe.experts.items()})
    run = fit(tmp_path, silent, 0.4)
    with pytest.raises(ValueError, match=r"no calibration texts in a file for a, b"):
        export_mixture(run, tmp_path / "moe")
    with pytest.raises(ValueError, match=r"no mixture with the .* of GemmaForCausalLM.*LlamaForCausalLM"):
        mixture_of("base", {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]})


def test_settings_that_the_mixture_has_not_are_refused(tmp_path: Path) -> None:
    build("Qwen3", layer_types=["full_attention", "sliding_attention"], sliding_window=4,
          use_sliding_window=True).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="layers of sliding_attention"):
        translated_config(tmp_path, {"model_type": "qwen3_moe"})
