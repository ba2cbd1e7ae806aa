"""From hidden states to sentence embeddings, by the modules of the base's folder.

Legend: `B` examples, `T` tokens, `D` hidden size, `E` width of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainmerge.checkpoints import Checkpoint, SideModule, layer_name, module_folders, read_modules
from trainmerge.model.poolings import POOLINGS, poolings_of
from trainmerge.system.json_file import read_json
from trainmerge.system.text import shortened

REMEDY = "Download or save it again."
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "ELU", "LeakyReLU", "Softplus", "Mish")
KNOWN = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
NAME = "sentence_embedding"  # what a Dense module reads and writes
WITH_FILES = ("Pooling", "Dense", "LayerNorm")
PLAIN = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}


@dataclass(frozen=True)
class Stage:
    """One module after the model."""

    kind: str  # Pooling, Dense, LayerNorm or Normalize
    poolings: tuple[str, ...] = ()
    layer: str = ""  # the child of the model that has its weights
    activation: str = "Identity"
    residual: bool = False  # whether its input is added, [B, E] with E = D

    def __call__(self, module: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] -> [B, E] if it is a pooling, else [B, D] -> [B, E]."""
        if self.kind == "Pooling":
            return torch.cat([POOLINGS[name](states, mask) for name in self.poolings], dim=-1)
        if self.kind == "Normalize":
            return normalize(states.float(), dim=-1)
        layer = module.get_submodule(self.layer)
        out: Tensor = layer(states.to(next(layer.parameters()).dtype))
        activation: nn.Module = getattr(nn, self.activation)()
        out = activation(out)
        return out + states if self.residual else out


@dataclass(frozen=True)
class Embedding:
    """The modules after the model, in order."""

    stages: tuple[Stage, ...]

    def __call__(self, module: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        """Sentence embeddings [B, E], float32 or wider, of the last hidden states [B, T, D]."""
        rows = hidden
        for stage in self.stages:
            rows = stage(module, rows, mask)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def identity(self) -> str:
        """A text that identifies the computation; the folders' names do not matter."""
        each = ((s, ("residual",) if s.residual else ()) for s in self.stages)
        return repr([(stage.kind, stage.poolings, stage.activation, *more) for stage, more in each])


def read_embedding(base: Checkpoint, pooling: str = "modules") -> Embedding:
    """How a checkpoint's folder embeds; with another `pooling`, that of its last hidden states.

    Raises:
        ValueError: the folder has no modules.json, or `pooling` is given in spite of it; a module of a kind
            that is not supported, or whose weights are not read.
    """
    found = embedding_of(base.path) if (base.path / "modules.json").is_file() else None
    if pooling != "modules":
        if found is not None:
            raise ValueError(
                f"{base.path}: modules.json says how it embeds, so leave out pooling={pooling!r}, or remove "
                "modules.json"
            )
        return Embedding((Stage("Pooling", (PLAIN[pooling],)),))
    if found is None:
        raise ValueError(
            f"{base.path}: no modules.json, which says how it embeds: set pooling to one of "
            f"{', '.join(PLAIN)}, or use the folder that sentence-transformers saved"
        )
    layers = {layer_name(name) for name in base.side}
    if absent := [stage.layer for stage in found.stages if stage.layer and stage.layer not in layers]:
        raise ValueError(
            f"{base.path}: no weights of {', '.join(absent)} in model.safetensors. Save them so, or set "
            "allow_pickle if you trust their source"
        )
    return found


def embedding_of(folder: Path) -> Embedding:
    """The modules of a folder with modules.json, from configurations alone.

    Raises:
        ValueError: a module of a kind that is not supported, or in another order; all of them in one error.
    """
    modules = read_modules(folder)
    strange = [module.kind or "one without a type" for module in modules if module.kind not in KNOWN]
    if strange:
        raise ValueError(
            f"{folder / 'modules.json'}: modules that are not supported: {_few(strange)}; supported are "
            f"{', '.join(KNOWN)}. Learn by Alignment, which reads none of them"
        )
    kinds = [module.kind for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") > 1 or "Transformer" in kinds[1:]:
        raise ValueError(
            f"{folder / 'modules.json'}: lists {_few(kinds)}; first comes one Transformer, then one Pooling"
        )
    folders = module_folders(folder)
    lost = [m.place or m.kind for m in modules if m.kind in WITH_FILES and Path(m.place) not in folders]
    if lost:
        raise ValueError(f"{folder / 'modules.json'}: no folder {_few(lost)} in it. {REMEDY}")
    if modules[0].place:
        raise ValueError(
            f"{folder / 'modules.json'}: its Transformer is in {_few([modules[0].place])}: move its files "
            f"into {folder}, and set its path to an empty text"
        )
    return Embedding(tuple(_stage(folder, module) for module in modules[1:] if module.kind != "Dropout"))


def unread_modules(folder: Path) -> list[str]:
    """Why no fit can follow the modules of a folder, `embedding_of`'s error; empty without modules.json."""
    try:
        if read_modules(folder):
            embedding_of(folder)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    return []


def _stage(folder: Path, module: SideModule) -> Stage:
    if module.kind == "Normalize":
        return Stage("Normalize")
    path = folder / module.place / "config.json"
    config = read_json(path, REMEDY) if path.is_file() or module.kind != "LayerNorm" else {}
    if module.kind == "Pooling":
        return Stage("Pooling", poolings_of(config, path))
    if module.kind == "LayerNorm":
        return Stage("LayerNorm", layer=layer_name(f"{module.place}.norm.weight"))
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = named.rpartition(".")[2]
    if activation not in ACTIVATIONS or not named.startswith("torch.nn."):
        raise ValueError(
            f"{path}: the activation {_few([named])} is not one of torch.nn's {', '.join(ACTIVATIONS)}"
        )
    names = [config.get(key) or NAME for key in ("module_input_name", "module_output_name")]
    if names != [NAME, NAME]:
        raise ValueError(
            f"{path}: reads or writes {_few([str(name) for name in names])}; only {NAME} is supported"
        )
    layer = layer_name(f"{module.place}.linear.weight")
    return Stage("Dense", layer=layer, activation=activation, residual=config.get("use_residual") is True)


def _few(names: Sequence[str]) -> str:
    """The names in one error, shortened: they are a stranger's."""
    return shortened(", ".join(names), 300)
