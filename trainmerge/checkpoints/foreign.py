"""Folders and files of weights that are no transformers checkpoint, recognised by name.

A recipe needs a folder of transformers or peft. What else people have is either a state dict, which
`state_dict_files` reads, or a format that must be converted first.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from trainmerge.checkpoints.weight_files import PICKLE, SAFETENSORS, read_folder_json
from trainmerge.checkpoints.whole import MANIFEST, PACKED
from trainmerge.system.text import listed
from trainmerge.system.torch_file import METADATA

DIFFUSERS = "diffusion_pytorch_model"
SAVED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")  # torch.save's usual names
TORCH_SHARD = re.compile(r"consolidated\.\d+\.pth$")

# What a file's or folder's other names mean, and what makes it a state dict.
CONVERT = {
    ".gguf": ("a GGUF file", "Use the float checkpoint that it was made from"),
    ".onnx": ("an ONNX graph", "Use the PyTorch weights that it was exported from"),
    ".h5": ("Keras weights", "Load them in transformers with from_tf=True and save as safetensors"),
    ".msgpack": ("Flax weights", "Load them in transformers with from_flax=True and save as safetensors"),
    ".distcp": ("a part of a torch.distributed checkpoint", "Give its folder"),
    ".npz": ("numpy arrays", "Load them with numpy.load and give {name: torch.from_numpy(array)}"),
}


class Foreign(NamedTuple):
    """Weights that are no transformers checkpoint."""

    what: str
    files: tuple[Path, ...]  # whose tensors are its state dict; none if they cannot be read
    remedy: str  # if they cannot be read


def recognise(path: Path) -> Foreign | None:
    """What a path is, by its files' names; None for something else, a transformers folder too."""
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    if "config.json" in names:  # the authors' own layout beside it, as Mistral has, is not read
        return _with_config(path, names)
    return _without_config(path, names)


def refuse_foreign(path: Path) -> None:
    """Raise ValueError for a path that a recipe cannot take, with what it is and what can."""
    found = recognise(path)
    incomplete = path.is_dir() and not (path / "config.json").exists()  # a download of transformers, perhaps
    if found is None or (incomplete and {file.name for file in found.files} & {SAFETENSORS, PICKLE}):
        return
    if not found.files:
        raise ValueError(f"{path}: {found.what}, no transformers folder. {found.remedy}.")
    if found.files[0].name == METADATA:
        raise ValueError(
            f"{path}: {found.what}, no transformers folder. In Python, tm.unshard(path, out, "
            "like=BASE) makes one of it"
        )
    raise ValueError(
        f"{path}: {found.what}, no transformers folder. In Python, tm.merge_state_dicts(base, "
        "{name: expert}, coefficient) merges such files, and tm.fit_module learns the coefficients."
    )


def _file(path: Path) -> Foreign | None:
    if path.suffix in CONVERT:
        what, remedy = CONVERT[path.suffix]
        return Foreign(what, (), remedy)
    if TORCH_SHARD.search(path.name) and len(shards := _torch_shards(path.parent)) > 1:
        return _parallel(shards)
    if path.suffix == ".safetensors":
        return Foreign("a safetensors file", (path,), "")
    return Foreign("a file of torch.save", (path,), "") if path.suffix in SAVED else None


def _with_config(path: Path, names: list[str]) -> Foreign | None:
    """A folder with config.json: of diffusers, timm or transformers."""
    if weights := _diffusers(path, names):
        return Foreign("a component of diffusers", weights, "")
    config = read_folder_json(path / "config.json")
    timm = "architecture" in config and "model_type" not in config
    single = [path / name for name in (SAFETENSORS, PICKLE) if name in names]
    if timm and single and find_spec("timm") is None:  # with timm, transformers can load it
        return Foreign("a model of timm", (single[0],), "")
    return None


def _without_config(path: Path, names: list[str]) -> Foreign | None:
    if PACKED in names and MANIFEST in names:
        return Foreign("packed experts", (), "Unpack one of them: trainmerge unpack PACKED TASK OUT")
    if "model_index.json" in names:
        inside = sorted(p.parent.name for p in path.glob(f"*/{DIFFUSERS}*"))
        parts = listed([f"{path.name}/{name}" for name in dict.fromkeys(inside)]) or "unet or transformer"
        remedy = f"`trainmerge merge` takes it whole; here, give the folder of one component: {parts}"
        return Foreign("a pipeline of diffusers", (), remedy)
    if weights := _diffusers(path, names):
        return Foreign("a component of diffusers", weights, "")
    if "consolidated.safetensors" in names:
        return Foreign("weights in their authors' layout", (path / "consolidated.safetensors",), "")
    if shards := _torch_shards(path):
        one = Foreign("weights in their authors' layout", (shards[0],), "")
        return one if len(shards) == 1 else _parallel(shards)
    if METADATA in names and any(name.endswith(".distcp") for name in names):
        return Foreign("a torch.distributed checkpoint", (path / METADATA,), "")
    if any(name.startswith("zero_pp_rank") or name.endswith("_model_states.pt") for name in names):
        return Foreign("a checkpoint of DeepSpeed", (), "Convert it with its own zero_to_fp32.py")
    for name in names:
        if Path(name).suffix in CONVERT:
            what, remedy = CONVERT[Path(name).suffix]
            return Foreign(f"a folder with {what} ({name})", (), remedy)
    weights = tuple(path / name for name in names if Path(name).suffix in (".safetensors", *SAVED))
    return _bare(weights)


def _bare(weights: tuple[Path, ...]) -> Foreign | None:
    """A folder of weights without a configuration."""
    own = tuple(file for file in weights if not file.name.startswith(("adapter_", "training_args")))
    if not own or any(re.search(r"-\d+-of-\d+\.", file.name) for file in own):
        return None
    what = f"a folder of weights without config.json ({listed([file.name for file in own])})"
    return Foreign(what, own, "") if len(own) == 1 else Foreign(what, (), "Give one of its files")


def _diffusers(path: Path, names: list[str]) -> tuple[Path, ...]:
    """A component's weights, or what names its shards."""
    wanted = (f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.safetensors.index.json", f"{DIFFUSERS}.bin")
    return tuple(path / name for name in wanted if name in names)[:1]


def _torch_shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("consolidated.*.pth") if TORCH_SHARD.search(file.name))


def _parallel(shards: list[Path]) -> Foreign:
    return Foreign(
        f"{len(shards)} parts of weights that were split over as many devices ({shards[0].name}, ...)",
        (),
        "Each part has some rows or columns of every tensor. Convert them to a transformers folder with its "
        "convert_llama_weights_to_hf.py",
    )
