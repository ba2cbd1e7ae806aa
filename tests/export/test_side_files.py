"""What travels with an export: side files and side modules, never weights for other runtimes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainmerge as tm
from tests.fitting.test_fit import fit_world
from tests.world import recipe, write_world
from trainmerge.export.side_files import copy_side_files

FOREIGN = [
    "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.onnx_data",
    "model.onnx.data", "model.tflite", "model.npz", "model-q4.gguf", "pytorch_model.bin",
    "training_args.bin", "weights", "onnx/model_int8.onnx", "onnx/config.json",
    "openvino/openvino_model.xml", "openvino/openvino_model.bin",
    "coreml/text.mlpackage/Data/weight.bin", "coreml/text.mlpackage/Manifest.json",
    "saved_model/saved_model.pb", "saved_model/variables/variables.data-00000-of-00001",
    "saved_model/variables/variables.index", "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json", "original/consolidated.00.pth", "model.safetensors.index.json",
    "trainmerge_manifest.json", "README.md", ".cache/x.json", "m.unheard",
]  # fmt: skip
TRAVELS = [
    "config.json", "generation_config.json", "tokenizer.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "modeling_own.py", "LICENSE", "notes/README.md", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json",
]  # fmt: skip
MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../outside"}, {"path": "none"}]


def write(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0weights" if name == "weights" else b"text")
    (folder / "modules.json").write_text(json.dumps(MODULES))


def test_side_files_travel_and_weights_do_not(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write(base, FOREIGN + TRAVELS)
    with pytest.warns(UserWarning, match=r"m\.unheard is not copied"):
        copy_side_files(base, out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(TRAVELS)


@pytest.mark.parametrize(
    "local", ["/home/me/base", "./base", "~/base", "data/cache/base", r"C:\me\base", "here", "../x"]
)
def test_local_paths_of_origin_are_left_out_and_hub_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    base.mkdir()
    content = {"_name_or_path": "org/name-1.5", "text_config": {"_name_or_path": local, "é": 1.5}, "x": []}
    (base / "config.json").write_text(json.dumps(content))
    (base / "tokenizer_config.json").write_text(json.dumps({"name_or_path": local}))
    (base / "adapter_config.json").write_text('{ "base_model_name_or_path":"gpt2","a":1}')
    copy_side_files(base, out)
    read = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    assert read["config.json"] == {**content, "text_config": {"é": 1.5}}
    assert read["tokenizer_config.json"] == {}
    assert (out / "adapter_config.json").read_bytes() == (base / "adapter_config.json").read_bytes()


def write_dense(folder: Path, scale: float) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": scale * torch.ones(2, 2)}, folder / "2_Dense/model.safetensors")


def test_a_dense_layer_after_the_model_is_the_bases(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    folders = [Path(merge.base), *(Path(expert.path) for expert in merge.experts.values())]
    for folder in folders:
        write_dense(folder, 1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*2_Dense")
        merge.open(tmp_path / "workspace")
    save_file({"linear.weight": 2 * torch.ones(2, 2)}, folders[1] / "2_Dense/model.safetensors")
    with pytest.warns(UserWarning, match=r"2_Dense/model\.safetensors differs from the base's"):
        fit_world(tmp_path, tmp_path / "run", steps=1, recipe=merge)
    tm.export_run(tmp_path / "run", tmp_path / "merged")
    assert load_file(tmp_path / "merged/2_Dense/model.safetensors")["linear.weight"].eq(1).all()
    manifest = json.loads((tmp_path / "merged/trainmerge_manifest.json").read_text())
    assert {"model.safetensors", "2_Dense/model.safetensors"} < manifest["files"].keys()


def test_a_farm_of_linked_weights_exports_the_same_and_no_linked_secret(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    fit_world(tmp_path, tmp_path / "run", steps=1, recipe=merge)
    tm.export_run(tmp_path / "run", tmp_path / "before")
    folders = [Path(merge.base), *(Path(expert.path) for expert in merge.experts.values())]
    for number, folder in enumerate(folders):
        for file in folder.glob("*.safetensors"):
            file.rename(tmp_path / f"stored-{number}")
            file.symlink_to(tmp_path / f"stored-{number}")
    (tmp_path / "secret").write_text("token=hf_x")
    (folders[0] / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=r"notes\.txt is a link that leads out"):
        tm.export_run(tmp_path / "run", tmp_path / "after")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("before", "after"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(b"hf_x" in path.read_bytes() for path in (tmp_path / "after").iterdir())


def test_a_corrected_side_file_is_exported(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    base = Path(merge.base)
    fit_world(tmp_path, tmp_path / "run", steps=1, recipe=merge)
    tm.export_run(tmp_path / "run", tmp_path / "before")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 77}))
    with pytest.warns(UserWarning, match=r"eos_token_id is None, the base has \[1, 2\]\. The merge"):
        tm.export_run(tmp_path / "run", tmp_path / "after")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "after" / name).read_text() == (base / name).read_text()
    weights = [(tmp_path / side / "model.safetensors").read_bytes() for side in ("before", "after")]
    assert weights[0] == weights[1]
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "layer_norm_eps": 0.5}))
    with pytest.raises(ValueError):  # noqa: PT011 - of the experts' values, or of the fit's
        tm.export_run(tmp_path / "run", tmp_path / "never")
