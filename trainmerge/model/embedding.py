"""From hidden states to sentence embeddings, by the modules of the base's folder.

Legend: `B` examples, `T` tokens, `D` hidden size, `E` width of an embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainmerge.checkpoints import Checkpoint, SideModule, layer_name, module_folders, read_modules
from trainmerge.data.heads import pool
from trainmerge.system.json_file import read_json
from trainmerge.system.text import shortened

KEY = "pooling_mode_"
REMEDY = "Download or save it again."
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "ELU", "LeakyReLU", "Softplus", "Mish")
KNOWN = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
WITH_FILES = ("Pooling", "Dense", "LayerNorm")
Pooled = Callable[[Tensor, Tensor], Tensor]  # hidden states [B, T, D], mask [B, T] -> [B, D]


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _root_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].float()
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1).sqrt()).to(hidden.dtype)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))[..., None].float()
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).to(hidden.dtype)


# By sentence-transformers' keys `pooling_mode_*`, in the order in which it concatenates them
POOLINGS: dict[str, Pooled] = {
    "cls_token": lambda hidden, mask: pool(hidden, mask, "first"),
    "max_tokens": _largest,
    "mean_tokens": lambda hidden, mask: pool(hidden, mask, "mean"),
    "mean_sqrt_len_tokens": _root_mean,
    "weightedmean_tokens": _weighted_mean,
    "lasttoken": _last,
}
PLAIN = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}
SHORT = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "weightedmean": "weightedmean_tokens",
}


@dataclass(frozen=True)
class Stage:
    """One module after the model."""

    kind: str  # Pooling, Dense, LayerNorm or Normalize
    poolings: tuple[str, ...] = ()
    layer: str = ""  # the child of the model that has its weights
    activation: str = "Identity"

    def __call__(self, module: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] -> [B, E] if it is a pooling, else [B, D] -> [B, E]."""
        if self.kind == "Pooling":
            return torch.cat([POOLINGS[name](states, mask) for name in self.poolings], dim=-1)
        if self.kind == "Normalize":
            return normalize(states.float(), dim=-1)
        layer = module.get_submodule(self.layer)
        out: Tensor = layer(states.to(next(layer.parameters()).dtype))
        activation: nn.Module = getattr(nn, self.activation)()
        return activation(out)  # type: ignore[no-any-return]


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
        return repr([(stage.kind, stage.poolings, stage.activation) for stage in self.stages])


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
            f"{', '.join(KNOWN)}"
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


def _stage(folder: Path, module: SideModule) -> Stage:
    if module.kind == "Normalize":
        return Stage("Normalize")
    path = folder / module.place / "config.json"
    config = read_json(path, REMEDY) if path.is_file() or module.kind != "LayerNorm" else {}
    if module.kind == "Pooling":
        return Stage("Pooling", _poolings(config, path))
    if module.kind == "LayerNorm":
        return Stage("LayerNorm", layer=layer_name(f"{module.place}.norm.weight"))
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = named.rpartition(".")[2]
    if activation not in ACTIVATIONS or not named.startswith("torch.nn."):
        raise ValueError(
            f"{path}: the activation {_few([named])} is not one of torch.nn's {', '.join(ACTIVATIONS)}"
        )
    return Stage("Dense", layer=layer_name(f"{module.place}.linear.weight"), activation=activation)


def _poolings(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The poolings that a configuration names, by its keys `pooling_mode_*` or `pooling_mode`."""
    given = config.get("pooling_mode", [])
    listed = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    chosen = [SHORT.get(str(name), str(name)) for name in listed]
    chosen += [key.removeprefix(KEY) for key, on in config.items() if key.startswith(KEY) and on is True]
    known = tuple(name for name in POOLINGS if name in chosen)
    strange = [name for name in chosen if name not in POOLINGS]
    if strange or not known:
        raise ValueError(
            f"{path}: poolings {_few(strange) or 'of no kind'}; supported are {', '.join(POOLINGS)}"
        )
    return known


def _few(names: Sequence[str]) -> str:
    """The names in one error, shortened: they are a stranger's."""
    return shortened(", ".join(names), 300)
