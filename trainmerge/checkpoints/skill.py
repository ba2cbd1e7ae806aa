"""A LoRA of a diffusers pipeline: low-rank changes of its components' weights, in the known key forms.

| form | a key |
|---|---|
| diffusers | `unet.down_blocks.0...to_q.lora_A.weight`, `.lora_B.weight` |
| older diffusers | `to_q.lora.down.weight`, `processor.to_q_lora.up.weight`, `lora_linear_layer.up.weight` |
| one component's | `down_blocks.0...to_q.lora_A.weight` |
| kohya | `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha` |

The change is alpha / rank * B A, of a convolution with a kernel too. alpha is in the file per layer, or in
its metadata (diffusers' `lora_adapter_metadata`), or is the rank.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.pattern_time import pattern_problem
from trainmerge.checkpoints.pipeline import INDEX, SKILL, Component, Pipeline
from trainmerge.kernels import LowRank
from trainmerge.system.safetensors_file import MappedFile
from trainmerge.system.text import listed

KEY = re.compile(r"(.+?)[._](?:lora_linear_layer|lora)[._](A|B|down|up)(?:\.default)?\.weight")
KOHYA = {
    "lora_unet": ("unet", "transformer", ""), "lora_transformer": ("transformer", "unet", ""),
    "lora_te1": ("text_encoder",), "lora_te2": ("text_encoder_2",), "lora_te3": ("text_encoder_3",),
    "lora_te": ("text_encoder",),
}  # fmt: skip
MAIN = ("unet", "transformer", "prior", "")
OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
METADATA = "lora_adapter_metadata"


def skill_file(path: Path) -> Path | None:
    """The file of a LoRA that is given by it or by its folder; None for anything else."""
    if path.suffix == ".safetensors" and path.is_file():
        return path
    if not path.is_dir() or any((path / name).is_file() for name in (INDEX, "config.json")):
        return None
    if (path / SKILL).is_file():
        return path / SKILL
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def open_skill(base: Pipeline, file: Path) -> dict[str, LowRank]:
    """Full name of each changed tensor of the base -> its change.

    Raises:
        ValueError: lists keys that are no LoRA's (DoRA, LoHa, LoKr), layers that the base lacks, and factors
            of other shapes.
    """
    mapped = MappedFile(file)
    factors: dict[str, dict[str, str]] = {}
    alphas, strange = {}, []
    for key in mapped.tensors:
        if found := KEY.fullmatch(key):
            part = "up" if found[2] in ("B", "up") else "down"
            factors.setdefault(found[1], {})[part] = key
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(mapped.read(key))
        else:
            strange.append(key)
    if strange or not factors:
        raise ValueError(
            f"{file}: {listed(strange) or 'it has nothing that'} is no factor of a LoRA. Only LoRA's "
            "lora_A/lora_B, lora.down/up and kohya's lora_down/lora_up can be merged: fuse another kind of "
            "adapter into its pipeline with diffusers, and give that"
        )
    reader = _Reader(base, mapped, _settings(file, mapped))
    changes: dict[str, LowRank] = {}
    problems: list[str] = []
    for module, keys in factors.items():
        try:
            name, term = reader.change(module, keys, alphas.get(module))
            changes[name] = term
        except ValueError as error:
            problems.append(str(error))
    if unused := [module for module in alphas if module not in factors]:
        problems.append(f"alphas without factors: {listed(unused)}")
    if problems:
        raise ValueError(f"{file}: not a LoRA of {base.path.name}:\n  " + "\n  ".join(_shown(problems)))
    return changes


def _shown(problems: list[str]) -> Iterator[str]:
    yield from problems[:8]
    if len(problems) > 8:
        yield f"and {len(problems) - 8} more"


def _settings(file: Path, mapped: MappedFile) -> dict[str, Any]:
    """diffusers' metadata of the adapter; empty without."""
    try:
        content = json.loads(mapped.metadata.get(METADATA) or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its {METADATA} is no JSON ({error}). Save the LoRA again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: its {METADATA} is no mapping. Save the LoRA again.")
    return content


@dataclass(frozen=True)
class _Reader:
    base: Pipeline
    file: MappedFile
    settings: Mapping[str, Any]

    def change(self, module: str, keys: Mapping[str, str], alpha: float | None) -> tuple[str, LowRank]:
        """The base's tensor and its change.

        Raises:
            ValueError: no such layer, a factor without the other, or another shape.
        """
        if len(keys) < 2:
            raise ValueError(f"{module}: one factor of two ({listed(list(keys.values()))})")
        component, name = self._find(module)
        up, down = self.file.read(keys["up"]).flatten(1), self.file.read(keys["down"]).flatten(1)
        shape = component.tensors[name].shape
        if (
            len(shape) < 2
            or (len(up), down.shape[1]) != (shape[0], shape[1:].numel())
            or up.shape[1] != len(down)
        ):
            sizes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            raise ValueError(f"{module}: factors of {sizes} for {name} of {tuple(shape)}: another base's?")
        layer = name.removesuffix(".weight")
        scale = self._scale(component, layer, len(down)) if alpha is None else alpha / len(down)
        return self.base.full_name(component.name, name), LowRank(up, down, scale)

    def _find(self, module: str) -> tuple[Component, str]:
        """The component and the tensor that a key's module means."""
        for prefix, places in KOHYA.items():
            if module.startswith(f"{prefix}_"):
                part = self._part(places, module)
                rest = module.removeprefix(f"{prefix}_")
                own = {name.removesuffix(".weight").replace(".", "_"): name for name in part.tensors}
                found = [own[name] for name in _spellings(rest, "_") if name in own]
                return part, _first(found, module, part)
        words = module.removeprefix("base_model.model.").replace(".processor.", ".")
        first, _, rest = words.partition(".")
        if first and first in self.base.components:
            part = self.base.components[first]
        else:
            part = self._part(MAIN, module)
            rest = rest if self.base.single and first in MAIN else words
        found = [f"{name}.weight" for name in _spellings(rest, ".") if f"{name}.weight" in part.tensors]
        return part, _first(found, module, part)

    def _part(self, places: tuple[str, ...], module: str) -> Component:
        for name in places:
            if name in self.base.components:
                return self.base.components[name]
        raise ValueError(f"{module}: the base has no {' or '.join(filter(None, places))}")

    def _scale(self, component: Component, layer: str, rank: int) -> float:
        """The scale that the file's metadata give to a layer; 1 without."""
        for prefix in (f"{component.name}.", "") if component.name else ("", "unet.", "transformer."):
            own = {k.removeprefix(prefix): v for k, v in self.settings.items() if k.startswith(prefix)}
            if "lora_alpha" in own:
                break
        else:
            return 1.0
        alpha = own["lora_alpha"]
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if problem := pattern_problem(pattern):
                raise ValueError(f"alpha_pattern has {pattern!r}, which {problem}")
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"{layer}: its lora_alpha is {alpha!r}, no number")
        return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _spellings(layer: str, dot: str) -> list[str]:
    """A layer's names in the base, by the spellings that versions and trainers have, most likely first."""
    head, _, _ = layer.rpartition(dot)
    old = [f"{head}{dot}{ours}" for theirs, ours in OLD.items() if layer.endswith(f"{dot}{theirs}")]
    found = [layer, f"{layer}{dot}0", *old]
    inner = f"text_model{dot}".replace(".", dot)
    return [*found, *(name.removeprefix(inner) for name in found), *(f"{inner}{name}" for name in found)]


def _first(found: list[str], module: str, part: Component) -> str:
    if not found:
        raise ValueError(
            f"{module}: {part.name or 'the base'} has no such layer. If these are names of another program "
            "(sgm, Flux), load the LoRA with diffusers and save it with save_lora_weights"
        )
    return found[0]
