"""The least that any exporter does: read base and experts, one float32 pass in the cache, write the shards.

    python tests/bench/minimum_merge.py OUT WEIGHT BASE EXPERT...

No check, no hash, no card. Nothing of trainmerge is imported.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 1 << 18


def merged(base: torch.Tensor, experts: list[torch.Tensor], weight: float) -> torch.Tensor:
    """(1 - K weight) base + weight sum of experts."""
    out = torch.empty_like(base)
    total, other = torch.empty(2, BLOCK)
    flat = [tensor.view(-1) for tensor in (out, base, *experts)]
    for first in range(0, base.numel(), BLOCK):
        target, origin, *models = (tensor[first : first + BLOCK] for tensor in flat)
        summed, scratch = total[: len(target)], other[: len(target)]
        summed.copy_(origin).mul_(1 - weight * len(models))
        for model in models:
            summed.add_(scratch.copy_(model), alpha=weight)
        target.copy_(summed)
    return out


def main(out: Path, weight: float, base: Path, experts: list[Path]) -> None:
    """One shard after the other, each tensor found by the indices."""
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    homes = [
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] for folder in experts
    ]
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 - no mapping
                weights = []
                for folder, home in zip(experts, homes, strict=True):
                    with safe_open(folder / home[name], "pt") as other:
                        weights.append(other.get_tensor(name))
                tensors[name] = merged(file.get_tensor(name), weights, weight)
        save_file(tensors, out / shard.name, {"format": "pt"})
    for side in base.glob("*.json"):
        (out / side.name).write_text(side.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), [Path(path) for path in sys.argv[4:]])
