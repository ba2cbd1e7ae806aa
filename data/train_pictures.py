"""Train the experts of the vision suite: DINOv2 ViT-S/14 with one linear probe a task.

<cache>/heads/pictures/<task>.safetensors    the probe on the base's pooled output, frozen
<cache>/experts/pictures/<task>/             all weights of the tower, trained under that probe

A finished expert is skipped; a stopped run leaves none half done, so run the same command again.

B pictures, C classes, D hidden size, N pictures of a task.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import datasets
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BitImageProcessorPil, Dinov2Model, get_linear_schedule_with_warmup

from atomic import complete_folder
from dino import base_dir, prepare_base
from picture_tasks import TASKS, picture_dir, prepare_pictures
from sources import FetchError, cache_dir, say
from texts import write_json

LEARNING_RATE, WEIGHT_DECAY, BATCH, WARM_UP, CLIP, SEED = 2e-5, 0.01, 32, 0.1, 1.0, 0
SEEN = 1600  # pictures that each expert is trained on, repeated as often as it takes
PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 400, 0.01, 1e-3


def expert_dir(task: str) -> Path:
    """Where the finished expert of a task is."""
    return cache_dir() / "experts" / "pictures" / task


def head_file(task: str) -> Path:
    """Where the probe of a task is."""
    return cache_dir() / "heads" / "pictures" / f"{task}.safetensors"


def read(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, 56, 56] and classes [N]."""
    rows = datasets.Dataset.from_parquet(
        str(picture_dir(task) / f"{split}.parquet"), keep_in_memory=True
    )
    processor = BitImageProcessorPil.from_pretrained(base_dir())
    pictures = [Image.open(BytesIO(content)).convert("RGB") for content in rows["image"]]
    return processor(images=pictures, return_tensors="pt")["pixel_values"], torch.tensor(
        rows["label"]
    )


@torch.inference_mode()
def features(model: nn.Module, pixels: Tensor) -> Tensor:  # -> [N,D]
    """The pooled output."""
    return torch.cat([model(part).pooler_output for part in pixels.split(64)])


def probe(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:  # [N,D], [N] -> [C,D], [C]
    """A linear layer by full-batch AdamW, from zero."""
    head = nn.Linear(inputs.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=PROBE_RATE, weight_decay=PROBE_DECAY)
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(inputs), labels).backward()
        optimizer.step()
    return {"classifier.weight": head.weight.detach(), "classifier.bias": head.bias.detach()}


def logits(head: dict[str, Tensor], inputs: Tensor) -> Tensor:  # [N,D] -> [N,C]
    """The probe's."""
    return nn.functional.linear(inputs, head["classifier.weight"], head["classifier.bias"])


def accuracy(model: nn.Module, head: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    found = logits(head, features(model, pixels)).argmax(-1)
    return float((found == labels).double().mean())


def fit(
    model: nn.Module, head: dict[str, Tensor], pixels: Tensor, labels: Tensor, title: str
) -> None:
    """Train the tower in place, under the frozen probe."""
    order, trained = random.Random(SEED), list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = SEEN // BATCH
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    stream: list[int] = []
    for _ in tqdm(range(steps), desc=title, unit="step", mininterval=5):
        if len(stream) < BATCH:
            stream += order.sample(range(len(labels)), len(labels))
        chosen, stream = stream[:BATCH], stream[BATCH:]
        found = logits(head, model(pixels[chosen]).pooler_output)
        nn.functional.cross_entropy(found, labels[chosen]).backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_expert(task: str) -> None:
    """Probe, train, save and score one expert, unless it is finished already."""
    folder, file = expert_dir(task), head_file(task)
    if (folder / "training.json").is_file() and file.is_file():
        say(f"{task}: expert already in {folder}")
        return
    torch.manual_seed(SEED)
    model = Dinov2Model.from_pretrained(base_dir()).eval()
    pixels, labels = read(task, "train")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(probe(features(model, pixels).clone(), labels), file)
    head, test = load_file(file), read(task, "test")
    start, before = time.process_time(), accuracy(model, head, *test)
    with complete_folder(folder) as aside:
        fit(model, head, pixels, labels, task)
        after = accuracy(model, head, *test)
        model.save_pretrained(aside)
        seconds = round(time.process_time() - start, 1)
        write_json(
            aside / "training.json", {"base": before, "expert": after, "cpu_seconds": seconds}
        )
    say(f"{task}: test accuracy {before:.3f} -> {after:.3f}, {seconds} s of one core")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the experts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        prepare_base()
        prepare_pictures()
    except FetchError as error:
        sys.exit(f"error: {error}")
    for task in options.tasks:
        train_expert(task)


if __name__ == "__main__":
    main()
