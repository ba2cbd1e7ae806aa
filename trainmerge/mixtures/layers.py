"""The layers of a mixture of experts, and where each expert's matrices are in its files.

Legend: `E` experts of a layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.mixtures.stacks import find_stacks
from trainmerge.system.plain_data import text_settings
from trainmerge.task_vectors.places import is_place, parameter_of, view

EXPERT = re.compile(r"(.*\.)experts\.(\d+)\.(\w+)\.weight")
ROUTER = re.compile(r"(gate|router)(?:\.layer)?\.(weight|bias|e_score_correction_bias)")
KINDS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # the settings that say E
PAIR = 2  # experts of a group that its score sums (DeepSeek-V3, GLM-4-MoE)


@dataclass(frozen=True)
class MixtureLayer:
    """One layer's router and experts.

    Args:
        prefix: What the names of its tensors begin with: `model.layers.0.mlp.`.
        experts: `E`.
        kinds: `gate`, `up`, `down`, and the biases of some -> the tensor in the files, or the place in a
            stack of all experts (`task_vectors.places`), with {} for the expert's number.
        routers: Tensors with one row per expert.
    """

    prefix: str
    experts: int
    kinds: Mapping[str, str]
    routers: tuple[str, ...]

    def expert(self, number: int, kind: str) -> str:
        """The tensor or place of an expert's matrix `gate`, `up` or `down`, or of a bias."""
        return self.kinds[kind].format(number)

    def read(self, base: Checkpoint, number: int, kind: str) -> Tensor:
        """An expert's matrix from the files: gate and up [I, H], down [H, I]; a bias [I] or [H]."""
        place = self.expert(number, kind)
        return view(place, base.read(parameter_of(place)))

    @property
    def stacks(self) -> frozenset[str]:
        """Tensors of the files that hold all experts."""
        return frozenset(parameter_of(place) for place in self.kinds.values() if is_place(place))

    @property
    def weight(self) -> str:
        """The router's weight."""
        return next(name for name in self.routers if name.endswith(".weight"))


def mixture_layers(base: Checkpoint) -> list[MixtureLayer]:
    """The layers of a mixture, in the order of the files' names.

    Raises:
        ValueError: there are none, or layers of different numbers of experts, or other matrices than a gate,
            an up and a down projection.
    """
    found: dict[str, set[tuple[int, str]]] = {}
    for name in base.tensors:
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1], set()).add((int(match[2]), match[3]))
    layers = [_layer(base, prefix, parts) for prefix, parts in found.items()]
    if not found:
        layers = [
            MixtureLayer(prefix, count, kinds, _routers(base, prefix, count))
            for prefix, (count, kinds) in find_stacks(base).items()
        ]
    if not layers:
        raise ValueError(f"{base.path}: no layer has a router and experts: a dense model?")
    if len(counts := {layer.experts for layer in layers}) > 1:
        raise ValueError(
            f"{base.path}: its layers have {sorted(counts)} experts, and shrink needs one number"
        )
    return sorted(layers, key=lambda layer: [int(n) for n in re.findall(r"\d+", layer.prefix)])


def _layer(base: Checkpoint, prefix: str, parts: set[tuple[int, str]]) -> MixtureLayer:
    count, names = 1 + max(number for number, _ in parts), sorted({name for _, name in parts})
    kinds = {KINDS.get(name, name): f"{prefix}experts.{{}}.{name}.weight" for name in names}
    routers = _routers(base, prefix, count)
    if kinds.keys() != {*KINDS.values()} or len(parts) != 3 * count or not routers:
        raise ValueError(
            f"{base.path}: the experts of {prefix} have {', '.join(names)}, {len(parts)} tensors in all, and "
            f"{len(routers)} of its router: shrink reads a gate, an up and a down projection for each of them"
        )
    return MixtureLayer(prefix, count, kinds, routers)


def _routers(base: Checkpoint, prefix: str, count: int) -> tuple[str, ...]:
    return tuple(
        name
        for name, info in base.tensors.items()
        if name.startswith(prefix) and ROUTER.fullmatch(name[len(prefix) :]) and info.shape[0] == count
    )


def routed_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json with the number of experts: `text_config` in models that read pictures."""
    return config if any(key in config for key in COUNTS) else text_settings(config)


def shrunk_settings(where: object, config: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """config.json for `experts` experts per layer.

    Raises:
        ValueError: more than there are, fewer than a token gets, or a number that does not fit the groups of
            DeepSeek's routers.
    """
    whole, config = config, routed_part(config)
    keys = [key for key in COUNTS if key in config]
    if not keys:
        raise ValueError(f"{where}: config.json has none of {', '.join(COUNTS)}")
    have, top_k = int(config[keys[0]]), int(config.get("num_experts_per_tok") or 1)
    groups, chosen = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    problems = []
    if not top_k <= experts <= have:
        problems.append(f"it has {have} experts per layer and gives each token {top_k}")
    if "n_group" in config and (experts % groups or experts // groups < PAIR):
        problems.append(
            f"its router has {groups} groups (n_group), which need {PAIR} or more experts, equally many"
        )
    elif experts // groups * chosen < top_k:
        problems.append(f"{chosen} of {groups} groups (topk_group) would have fewer than {top_k} experts")
    if problems:
        raise ValueError(f"{where}: {experts} experts are impossible: {'; '.join(problems)}")
    made = {**config, **dict.fromkeys(keys, experts)}
    return made if config is whole else {**whole, "text_config": made}
