"""An export in another dtype and files of another size: float32 sums rounded once, nothing else changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.world import languages_recipe, write_languages
from trainmerge.cli import main
from trainmerge.export.form import Form, write_dtype


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("form")
    write_languages(root)
    module = tm.MergeModule(languages_recipe(root), initial=0.3, workspace=str(root / "run/workspace"))
    trainer = tm.make_trainer(root / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, str(root / "base")), trainer, root / "run")
    return root / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") if file.name.startswith("model")
            for name, tensor in load_file(file).items()}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_the_float32_sum_rounded_once(run: Path, tmp_path: Path, dtype: str) -> None:
    tm.export_run(run, tmp_path / "plain")
    tm.export_run(run, tmp_path / dtype, dtype=dtype)
    wide, narrow = tensors(tmp_path / "plain"), tensors(tmp_path / dtype)
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        assert torch.equal(narrow[name], tensor.to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
    assert model.dtype == getattr(torch, dtype)
    assert tm.verify_export(run, tmp_path / dtype) == len(wide)


def test_shards_hold_at_most_the_size_and_load_as_one_model(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--shard-size", "10kB", "--verify"]) == 0
    tm.export_run(run, tmp_path / "plain")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    held = [load_file(tmp_path / "out" / file) for file in files]
    for own in held:
        assert len(own) == 1 or sum(t.nbytes for t in own.values()) <= 10_000
    assert sum(len(own) for own in held) == len(index["weight_map"])
    whole = tensors(tmp_path / "plain")
    assert all(torch.equal(tensor, whole[name]) for own in held for name, tensor in own.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.items())


def test_one_large_shard_has_no_index(run: Path, tmp_path: Path) -> None:
    tm.export_run(run, tmp_path / "out", shard_size="5GB")
    assert [file.name for file in tmp_path.glob("out/model*")] == ["model.safetensors"]


def test_verify_finds_one_changed_number_of_a_narrow_export(run: Path, tmp_path: Path) -> None:
    tm.export_run(run, tmp_path / "out", dtype="bfloat16")
    file = tmp_path / "out/model.safetensors"
    content = load_file(file)
    content["model.norm.weight"][3] += 1
    save_file(content, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight \(merged\) differs in 1 of 32"):
        tm.verify_export(run, tmp_path / "out")


def test_numbers_that_the_dtype_cannot_hold_are_refused(run: Path, tmp_path: Path) -> None:
    learned = tm.load_coefficients(run / "coefficients.safetensors")
    learned.reset_(torch.full_like(learned.raw, 1e7))
    with pytest.raises(ValueError, match="not finite"):
        tm.export_run(run, tmp_path / "out", coefficients=learned, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, "export.dtype must be one of float32, bfloat16, float16"),
        ({"shard_size": "5"}, "is not a size"),
        ({"shard_size": "0GB"}, "a file holds at least one byte"),
    ],
)
def test_unusable_forms_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Form(**settings)


def test_a_composed_models_parts_get_the_dtype_too(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": {"torch_dtype": "float32"}, "other": {"dtype": None}}))
    write_dtype(file, "bfloat16")
    content = json.loads(file.read_text())
    assert content == {
        "text_config": {"torch_dtype": "bfloat16"}, "other": {"dtype": None}, "dtype": "bfloat16"
    }  # fmt: skip
