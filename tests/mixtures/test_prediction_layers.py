"""Layers of multi-token prediction in the files: kept in merges, left out of shrunk mixtures; it is said."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.mixture_world import write_mixture
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.export import export_merge

PREFIXES = {  # as on the hub
    "DeepSeek-V3": "model.layers.61.",
    "GLM-4-MoE": "model.layers.46.",
    "Qwen3-Next": "mtp.layers.0.",
}


def add_layer(folder: Path, prefix: str, shift: float) -> None:
    """A copy of the last layer, with experts, under another name."""
    tensors = load_file(folder / "model.safetensors")
    last = [name for name in tensors if name.startswith("model.layers.1.")]
    extra = {name.replace("model.layers.1.", prefix): tensors[name] + shift for name in last}
    extra[f"{prefix}eh_proj.weight"] = torch.ones(32, 64)
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(params=PREFIXES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A base with such a layer, fine-tune a without, b with its own."""
    prefix = PREFIXES[request.param]
    write_mixture(tmp_path, request.param)
    add_layer(tmp_path / "base", prefix, 0.0)
    add_layer(tmp_path / "b", prefix, 0.5)
    for name in ("base", "a", "b"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["num_nextn_predict_layers"] = 1
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path, prefix


def test_a_merge_keeps_the_bases_and_says_so(world: tuple[Path, str]) -> None:
    root, prefix = world
    words = rf"transformers does not run \d+ tensors .*{prefix}.*stay the base's"
    with pytest.warns(UserWarning, match=words):
        opened = tm.Recipe(str(root / "base"), {n: tm.Expert(str(root / n)) for n in "ab"}).open()
    coefficients = Coefficients(("a", "b"), opened.layout, torch.tensor([[0.0], [1.0]]))
    export_merge(opened.base, opened.task_vectors, coefficients, root / "out")
    made, base, b = (load_file(root / own / "model.safetensors") for own in ("out", "base", "b"))
    assert made.keys() == base.keys()
    for name, own in made.items():
        assert_same_bits(own, (base if name.startswith(prefix) else b)[name])


def test_a_mixture_with_fewer_experts_leaves_them_out(world: tuple[Path, str]) -> None:
    root, prefix = world
    with pytest.warns(UserWarning, match=rf"of multi-token prediction are left out \({prefix}"):
        out = tm.shrink(root / "base", root / "out", 4, str(root / "a.jsonl"))
    with pytest.warns(UserWarning, match="left out"):
        tm.shrink(root / "base", root / "ream", 4, str(root / "a.jsonl"), "ream", steps=2)
    made, base = (load_file(own / "model.safetensors") for own in (out, root / "base"))
    assert made.keys() == {name for name in base if not name.startswith(prefix)}
    for name, own in made.items():
        assert_same_bits(own, base[name])  # 4 of 4 experts
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    _, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_other_models_are_quiet(tmp_path: Path) -> None:
    write_mixture(tmp_path, "DeepSeek-V3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "a"))}).open()
