"""The suite's model with K experts made beside it, and real texts: what the benchmarks fit."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trainmerge.coefficients.layout import Grouping
from trainmerge.data.heads import LabelHead
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

CACHE = Path(os.environ.get("TRAINMERGE_CACHE", Path.home() / ".cache" / "trainmerge"))
BASE = CACHE / "models" / "minilm-l6"
TASKS = ("news20", "r8", "movie", "uncertain", "amazon")  # the demo's: texts that `make data` has fetched


@contextmanager
def many_experts(count: int) -> Iterator[Recipe]:
    """MiniLM-L6 and `count` full experts, base + N(0, 1e-3) in every tensor; tasks repeat."""
    with tempfile.TemporaryDirectory() as root:
        base = load_file(BASE / "model.safetensors")
        experts = {}
        for k in range(count):
            folder, task = Path(root) / f"expert{k}", TASKS[k % len(TASKS)]
            folder.mkdir()
            generator = torch.Generator().manual_seed(k)
            moved = {
                name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in base.items()
            }
            save_file(moved, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text((BASE / "config.json").read_text())
            texts = CACHE / "text" / task
            experts[f"expert{k}"] = Expert(
                str(folder), str(texts / "calibration.jsonl"), head=LabelHead(str(texts / "labels.json"))
            )
        yield Recipe(str(BASE), experts, grouping=Grouping(exclude=["embeddings.*", "pooler.*"]))


def demo() -> Recipe:
    """The demo's five LoRA experts, as in configs/demo.yaml."""
    experts = {
        task: Expert(
            f"data/experts/{task}",
            str(CACHE / "text" / task / "calibration.jsonl"),
            head=LabelHead(str(CACHE / "text" / task / "labels.json")),
        )
        for task in TASKS
    }
    return Recipe(str(BASE), experts, grouping=Grouping(exclude=["embeddings.*", "pooler.*"]))


def texts_of(recipe: Recipe, expert: str, count: int) -> list[str]:
    """The first calibration texts of an expert."""
    file = recipe.experts[expert].calibration
    assert file is not None
    return [json.loads(line)["text"] for line in Path(file).read_text().splitlines()[:count]]
