"""Which experts of a layer stay, and which are merged into them.

A plan is a list of groups per layer, each with its centroid first, in the order of the centroids. Experts in
no group are dropped.

Legend: `E` experts of a layer, `M` of them after.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.mixtures.msmoe import join_nearest, routed_alike
from trainmerge.mixtures.saliency import Saliency
from trainmerge.mixtures.submoe import k_means
from trainmerge.system.json_file import read_json

Groups = Sequence[Sequence[int]]
METHODS = ("reap", "ream", "hc", "m-smoe", "sub-moe", "dern", "camera")
OUTPUTS = ("hc", "sub-moe")  # look at every expert's output for every kept token; no router with groups
USAGE = ("m-smoe", "sub-moe")  # weigh members by usage, others by saliency
LARGEST = 16  # experts of a group of `ream`, as published
FILE = "trainmerge_groups.json"


def plan_groups(
    method: str, own: Saliency, experts: int, parts: int = 1, scores: Tensor | None = None
) -> list[list[int]]:
    """The groups of one layer.

    `reap` (arXiv 2510.13999) keeps the experts with the largest scores and drops the others. `ream`, after
    arXiv 2604.04356: in the order of their scores the kept ones take their most similar others, 15 at most,
    until none is left. `hc` (arXiv 2410.08589): clusters of the experts' mean outputs by average linkage; the
    expert with the largest score is the centroid. `m-smoe`, `sub-moe`: see their files. `dern` and `camera`
    keep experts as `reap` does.

    Args:
        method: Its name.
        own: The layer's sums.
        experts: `M`.
        parts: Parts of a router's experts of which each keeps equally many (DeepSeek's `n_group`).
        scores: The experts' importance, [E], instead of REAP's.
    """
    if method == "hc":
        return _clusters(own, experts)
    if method == "sub-moe":
        return k_means(own.outputs / max(1, len(own.states)), own.usage, experts)
    if method == "m-smoe":
        return join_nearest(_largest(own.usage, experts, parts), routed_alike(own.alike))
    scores = own.scores if scores is None else scores
    kept = _largest(scores, experts, parts)
    if method == "ream":
        return _taken(kept, scores, similarity(own))
    return [[number] for number in kept]


def _largest(scores: Tensor, experts: int, parts: int) -> list[int]:
    """The experts with the largest scores, equally many of each part; in order."""
    size = len(scores) // parts
    found = [
        part * size + place
        for part in range(parts)
        for place in scores[part * size : (part + 1) * size]
        .argsort(descending=True, stable=True)[: experts // parts]
        .tolist()
    ]
    return sorted(found)


def _taken(kept: Sequence[int], scores: Tensor, alike: Tensor) -> list[list[int]]:
    groups = {number: [number] for number in kept}
    left = [number for number in range(len(scores)) if number not in groups]
    for centroid in sorted(kept, key=lambda number: -float(scores[number])):
        nearest = sorted(left, key=lambda number: -float(alike[centroid, number]))[: LARGEST - 1]
        groups[centroid] += nearest
        left = [number for number in left if number not in nearest]
    return [groups[number] for number in kept]


def similarity(own: Saliency) -> Tensor:
    """REAM's similarity of two experts, [E, E]: of their gated mean outputs, and of their router logits.

    Each is a cosine, moved to [0, 1]; their mean. An expert that no token reached has the cosine 0.
    """
    outputs = normalize(own.gated, dim=-1)
    return ((outputs @ outputs.T + 1) / 2 + routed_alike(own.alike)) / 2


def _clusters(own: Saliency, experts: int) -> list[list[int]]:
    """Average linkage of the mean outputs, Euclidean, until `experts` clusters are left."""
    means = own.outputs / max(1, len(own.states))
    apart = torch.cdist(means, means)
    apart.fill_diagonal_(torch.inf)
    clusters = {number: [number] for number in range(len(means))}
    while len(clusters) > experts:
        place = int(apart.argmin())
        one, other = sorted(divmod(place, len(means)))
        a, b = len(clusters[one]), len(clusters[other])
        row = (a * apart[one] + b * apart[other]) / (a + b)  # the mean over all pairs
        row[one] = torch.inf
        apart[one], apart[:, one] = row, row
        apart[other], apart[:, other] = torch.inf, torch.inf
        clusters[one] += clusters.pop(other)
    scores = own.scores
    found = [sorted(own_, key=lambda number: (-float(scores[number]), number)) for own_ in clusters.values()]
    return sorted(found)


def read_groups(
    path: Path, layers: Sequence[MixtureLayer], experts: int, parts: int = 1
) -> dict[str, list[list[int]]]:
    """A user's plan, or the one of an earlier `shrink`: prefix -> groups.

    Raises:
        ValueError: layers or experts that the checkpoint does not have, another number of groups, an expert
            that is twice there, or not equally many of each of the router's `parts`.
    """
    content = read_json(path, "See `trainmerge shrink --help`.").get("layers")
    wanted = [layer.prefix for layer in layers]
    if not isinstance(content, dict) or sorted(content) != sorted(wanted):
        raise ValueError(f"{path}: `layers` needs groups for each of {wanted[:3]}, {len(wanted)} in all")
    found = {layer.prefix: _checked(path, layer, content[layer.prefix], experts) for layer in layers}
    for layer in layers:
        kept = Counter(group[0] * parts // layer.experts for group in found[layer.prefix])
        if set(kept.values()) != {experts // parts}:
            raise ValueError(
                f"{path}: {layer.prefix} keeps {dict(sorted(kept.items()))} experts of the router's {parts} "
                f"groups: each needs {experts // parts}"
            )
    return found


def _checked(path: Path, layer: MixtureLayer, groups: Any, experts: int) -> list[list[int]]:
    flat = [number for group in groups for number in group] if _lists(groups) else None
    if flat is None or any(type(number) is not int or not 0 <= number < layer.experts for number in flat):
        raise ValueError(
            f"{path}: {layer.prefix} needs lists of experts 0 to {layer.experts - 1}, a centroid first"
        )
    if len(groups) != experts or len({*flat}) != len(flat) or not all(groups):
        raise ValueError(
            f"{path}: {layer.prefix} has {len(groups)} groups of {len(flat)} experts, {len({*flat})} of them "
            f"different: it needs {experts} groups, none empty, and every expert at most once"
        )
    return sorted(list(group) for group in groups)


def _lists(groups: Any) -> bool:
    return isinstance(groups, list) and all(isinstance(group, list) for group in groups)


def write_groups(
    path: Path, method: str, experts: int, groups: Mapping[str, Groups], errors: Mapping[str, Any]
) -> None:
    """Write a plan as `read_groups` reads it, with the layers' errors if coefficients were learned."""
    layers = {prefix: [list(group) for group in own] for prefix, own in groups.items()}
    content = {"method": method, "experts": experts, "layers": layers}
    content |= {"errors": dict(errors)} if errors else {}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def method_of(plan: str) -> str:
    """How a plan merges: its own name, or what a file of groups was made by; `ream` if it says nothing.

    Raises:
        ValueError: neither a method nor a file.
    """
    if plan in METHODS:
        return plan
    if not (path := Path(plan)).is_file():
        raise ValueError(f"--plan is {plan!r}: it is {', '.join(METHODS)}, or a file of groups")
    method = read_json(path, "See `trainmerge shrink --help`.").get("method")
    return method if method in METHODS else "ream"


def read_errors(folder: Path) -> dict[str, dict[str, float]]:
    """Prefix -> its errors, of a mixture whose coefficients were learned."""
    found: dict[str, dict[str, float]] = read_json(folder / FILE, "Shrink the mixture again.")["errors"]
    return found
