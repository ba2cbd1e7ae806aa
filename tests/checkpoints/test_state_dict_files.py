"""State dicts of other projects are read, or refused by what they are; a recipe refuses them all."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.plain_modules import expert_of, net
from tests.world import bert
from trainmerge.checkpoints.foreign import recognise

Make = Callable[[Path, dict[str, torch.Tensor]], Path]


def state() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.arange(6.0).view(3, 2), "bn.num_batches_tracked": torch.tensor(7)}


def torch_save(content: Callable[[dict[str, torch.Tensor]], object], name: str = "model.pth") -> Make:
    def make(folder: Path, own: dict[str, torch.Tensor]) -> Path:
        torch.save(content(own), folder / name)
        return folder / name

    return make


def safe(*names: str, config: dict[str, object] | None = None) -> Make:
    """A folder of safetensors files with a configuration; several are shards with an index."""

    def make(folder: Path, own: dict[str, torch.Tensor]) -> Path:
        homes = {tensor: names[i % len(names)] for i, tensor in enumerate(own)}
        for name in names:
            save_file({n: own[n] for n, home in homes.items() if home == name}, folder / name)
        if len(names) > 1:
            index = names[0].partition("-0")[0] + ".safetensors.index.json"
            (folder / index).write_text(json.dumps({"weight_map": homes}))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def safe_file(folder: Path, own: dict[str, torch.Tensor]) -> Path:
    return safe("weights.safetensors")(folder, own) / "weights.safetensors"


DIFFUSERS = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0"}
TIMM = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}}
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
READ: dict[str, Make] = {
    "a file": safe_file,
    "torch.save": torch_save(dict),
    "Lightning": torch_save(lambda s: {"epoch": 3, "state_dict": s, "optimizer_states": [{}]}, "last.ckpt"),
    "model": torch_save(lambda s: {"model": s, "args": {"lr": 0.1}}, "checkpoint.pt"),
    "diffusers": safe("diffusion_pytorch_model.safetensors", config=DIFFUSERS),
    "diffusers' shards": safe(*SHARDS, config=DIFFUSERS),
    "timm": safe("model.safetensors", config=TIMM),
    "consolidated": safe("consolidated.safetensors"),
    "a bare folder": safe("resnet.safetensors"),
    "Llama": lambda folder, own: torch_save(dict, "consolidated.00.pth")(folder, own).parent,
}


@pytest.mark.parametrize("kind", READ)
def test_state_dicts_are_read(kind: str, tmp_path: Path) -> None:
    if kind == "Llama":
        (tmp_path / "params.json").write_text("{}")
    path = READ[kind](tmp_path, state())
    found = tm.load_state_dict(path, allow_pickle=kind in ("torch.save", "Lightning", "model", "Llama"))
    assert found.keys() == state().keys()
    for name, tensor in state().items():
        assert_same_bits(found[name], tensor)


@pytest.mark.parametrize("kind", READ)
def test_a_recipe_says_what_a_foreign_base_is(kind: str, tmp_path: Path) -> None:
    path = READ[kind](tmp_path, state())
    recipe = tm.Recipe(str(path), {"a": tm.Expert(str(tmp_path / "a"))})
    with pytest.raises(ValueError, match=r"no transformers folder\. In Python, tm\.merge_state_dicts\("):
        recipe.open()


def test_pickled_files_need_permission(tmp_path: Path) -> None:
    path = torch_save(dict)(tmp_path, state())
    with pytest.raises(ValueError, match=r"model\.pth: a pickled file, which can run code.*set allow_pickle"):
        tm.load_state_dict(path)
    torch_save(dict, "diffusion_pytorch_model.bin")(tmp_path, state())
    with pytest.raises(ValueError, match="only pickled weights"):
        tm.load_state_dict(tmp_path)


class Module(nn.Module):
    pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            lambda s: {"state_dict": s, "state_dict_ema": s},
            r"several, under state_dict, state_dict_ema: .*key=",
        ),
        (
            lambda s: {"generator": s, "step": 3},
            r"its tensors are under generator: choose by key='generator'",
        ),
        (lambda _: Module(), "no state dict: "),
        (lambda s: {"state_dict": s, "args": Namespace(a=1)}, "no state dict: "),
        (lambda _: [1, 2], "the file has one list"),
        (lambda s: {**s, "step": 3}, "not a dictionary of tensors"),
    ],
)
def test_what_is_no_state_dict_is_refused(content, words: str, tmp_path: Path) -> None:
    path = torch_save(content)(tmp_path, state())
    with pytest.raises(ValueError, match=words) as error:
        tm.load_state_dict(path, allow_pickle=True)
    assert str(error.value).startswith(str(path))


def test_a_key_chooses(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state().items()}
    path = torch_save(lambda s: {"state_dict": s, "state_dict_ema": other})(tmp_path, state())
    found = tm.load_state_dict(path, key="state_dict_ema", allow_pickle=True)
    assert_same_bits(found["conv.weight"], other["conv.weight"])
    with pytest.raises(ValueError, match="no key 'ema'; its keys are state_dict, state_dict_ema"):
        tm.load_state_dict(path, key="ema", allow_pickle=True)
    with pytest.raises(ValueError, match="one state dict only"):
        tm.load_state_dict(safe_file(tmp_path, state()), key="ema")


REFUSED = {
    "unet/diffusion_pytorch_model.safetensors model_index.json": "a pipeline of diffusers.*model/unet",
    "consolidated.00.pth consolidated.01.pth params.json": "2 parts of weights .*convert_llama_weights_to_hf",
    "__0_0.distcp": "torch.distributed checkpoint.*Give its folder",
    "model-q4.gguf": "GGUF.*float checkpoint",
    "mp_rank_00_model_states.pt": "DeepSpeed.*zero_to_fp32",
    "flax_model.msgpack": "Flax",
    "one.safetensors two.safetensors": "Give one of its files",
}


@pytest.mark.parametrize("files", REFUSED)
def test_formats_that_must_be_converted_are_named(files: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for file in files.split():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"{}")
    with pytest.raises(ValueError, match=REFUSED[files]):
        tm.load_state_dict(folder, allow_pickle=True)
    with pytest.raises(ValueError, match=r"no transformers folder\. \S+"):
        tm.Recipe(str(folder), {"a": tm.Expert(str(tmp_path / "a"))}).open()


def test_a_part_of_a_split_checkpoint_is_refused_as_a_file_too(tmp_path: Path) -> None:
    for number in "01":
        torch_save(dict, f"consolidated.0{number}.pth")(tmp_path, state())
    with pytest.raises(ValueError, match="2 parts of weights that were split"):
        tm.load_state_dict(tmp_path / "consolidated.00.pth", allow_pickle=True)


def test_folders_of_transformers_and_peft_belong_into_a_recipe(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"a transformers folder: give it to tm\.Recipe"):
        tm.load_state_dict(tmp_path / "base")
    (tmp_path / "base" / "params.json").write_text("{}")  # Mistral's folders have both layouts
    save_file({"x": torch.ones(1)}, tmp_path / "base" / "consolidated.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"a peft adapter.*tm\.Recipe"):
        tm.load_state_dict(adapter)
    assert [recognise(path) for path in (tmp_path / "base", adapter)] == [None, None]


def test_other_paths_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        tm.load_state_dict(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: not a file of weights that is known here"):
        tm.load_state_dict(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="no weights that are known here"):
        tm.load_state_dict(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"x\.pth: no state dict: BadZipFile"):
        tm.load_state_dict(tmp_path / "x.pth", allow_pickle=True)


def test_files_are_merged_as_modules_are(tmp_path: Path) -> None:
    base = net()
    expert = expert_of(base, 1)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    torch.save({"state_dict": expert.state_dict()}, tmp_path / "a.ckpt")
    files = tm.merge_state_dicts(
        tmp_path / "base.safetensors", {"a": tmp_path / "a.ckpt"}, 0.4, buffers="average", allow_pickle=True
    )
    held = tm.merge_state_dicts(base, {"a": expert}, 0.4, buffers="average")
    assert files.keys() == held.keys()
    for name, tensor in held.items():
        assert_same_bits(files[name], tensor)
