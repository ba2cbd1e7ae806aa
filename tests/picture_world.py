"""A small world of pictures on disk: base, experts, image processor, pictures. Real formats, quick to fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from tests.family_settings import CLIP, SIGLIP, VISION
from tests.world import WORDS, nudge, write_tokenizer
from trainmerge.data.columns import Columns
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

SIDE = 32  # pixels
ALONE = Columns(text=None, image="image")
TASKS = ("shade", "hue")
SQUARE = {"height": SIDE, "width": SIDE}
CUT = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}


def build(kind: str, settings: dict[str, Any]) -> nn.Module:
    """A random model of transformers."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**settings))


def vit() -> nn.Module:
    return build("ViTForImageClassification", {**VISION, "num_labels": 3})


def clip() -> nn.Module:
    text = {**CLIP["text_config"], "vocab_size": len(WORDS) + 2}
    return build("CLIPModel", {**CLIP, "text_config": text, "logit_scale_init_value": 1.5})


def siglip() -> nn.Module:
    text = {**SIGLIP["text_config"], "vocab_size": len(WORDS) + 2, "max_position_embeddings": 12}
    model = build("SiglipModel", {**SIGLIP, "text_config": text})
    nudge(model, 5)  # its logit_scale and logit_bias begin at 0
    return model


def write_processor(folder: Path, kind: str = "ViTImageProcessorPil", **settings: Any) -> None:
    getattr(transformers, kind)(**(settings or {"size": SQUARE})).save_pretrained(folder)


def picture(seed: int, task: str = "shade", size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A picture of noise around the task's colour."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 120, (size[1], size[0], 3), generator=generator)
    noise[..., TASKS.index(task)] += 100
    return Image.fromarray(noise.to(torch.uint8).numpy())


def write_pictures(folder: Path, task: str, seed: int, count: int = 12, classes: int = 3) -> None:
    """`calibration/*.png`, and `test/CLASS/*.png`."""
    (folder / "calibration").mkdir(parents=True)
    for i in range(count):
        picture(seed + i, task).save(folder / "calibration" / f"{i}.png")
        place = folder / "test" / "abc"[i % classes]
        place.mkdir(parents=True, exist_ok=True)
        picture(1000 + seed + i, task).save(place / f"{i}.png")


def write_picture_world(root: Path, make: Callable[[], nn.Module], **heads: Any) -> Recipe:
    """Base and two full experts of a model, with pictures for each; `heads` by task."""
    make().save_pretrained(root / "base")
    write_processor(root / "base")
    if make in (clip, siglip):
        write_tokenizer(root / "base")
    experts = {}
    for seed, task in enumerate(TASKS):
        expert = make()
        nudge(expert, seed + 10)
        expert.save_pretrained(root / "experts" / task)
        write_pictures(root / task, task, 100 * seed)
        experts[task] = Expert(
            str(root / "experts" / task),
            calibration=str(root / task / "calibration"),
            test=str(root / task / "test"),
            head=heads.get(task),
        )
    return Recipe(str(root / "base"), experts)
