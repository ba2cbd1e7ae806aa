"""Prepare the pictures of the vision suite in the cache.

<cache>/pictures/<task>/train.parquet        labelled: what probe and expert are trained on
<cache>/pictures/<task>/calibration.parquet  unlabelled, other pictures: for learning coefficients
<cache>/pictures/<task>/test.parquet         labelled: only for scores

Fashion-MNIST (Debian, 70,000 of 28 x 28) and scikit-learn's digits (1,797 of 8 x 8), and variants
of them: rotated by 90 degrees, inverted. No two tasks share a picture.
"""

import gzip
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from atomic import complete_folder
from sources import FASHION, SCIKIT_LEARN, FetchError, cache_dir, fetch, say

Grey = NDArray[np.uint8]
DIGITS = "sklearn/datasets/data/digits.csv.gz"
UNPACKED = "usr/share/datasets/fashion-mnist"
SIDE = 28
SEED = 0
PARTS = {"fashion": 3, "digits": 2}  # into which a source's pictures are dealt


@dataclass(frozen=True)
class PictureTask:
    """One task: which pictures, how they are changed, and how many there are for training."""

    source: Literal["fashion", "digits"]
    part: int  # pictures of one source are dealt to its tasks
    change: Callable[[Image.Image], Image.Image]
    num_train: int
    num_calibration: int = 128
    num_test: int = 500


def same(picture: Image.Image) -> Image.Image:
    """The picture itself."""
    return picture


def rotated(picture: Image.Image) -> Image.Image:
    """Turned by 90 degrees, counterclockwise."""
    return picture.transpose(Image.Transpose.ROTATE_90)


TASKS = {
    "fashion": PictureTask("fashion", 0, same, 1500),
    "digits": PictureTask("digits", 0, same, 500, num_test=270),
    "fashion-rotated": PictureTask("fashion", 1, rotated, 1500),
    "digits-inverted": PictureTask("digits", 1, ImageOps.invert, 500, num_test=270),
}


def picture_dir(task: str) -> Path:
    """Where the prepared pictures of a task are."""
    return cache_dir() / "pictures" / task


def prepare_pictures() -> None:
    """Write every task's files that are not there."""
    if all((picture_dir(name) / "test.parquet").is_file() for name in TASKS):
        return
    sources = {"fashion": fashion(), "digits": digits()}
    for name, task in TASKS.items():
        images, labels = sources[task.source]
        order = random.Random(SEED).sample(range(len(images)), len(images))
        order = order[task.part :: PARTS[task.source]]
        sizes = [task.num_train, task.num_calibration, task.num_test]
        with complete_folder(picture_dir(name)) as aside:
            for split, size in zip(("train", "calibration", "test"), sizes, strict=True):
                chosen, order = order[:size], order[size:]
                content = {
                    "image": [encoded(task.change(Image.fromarray(images[i]))) for i in chosen]
                }
                if split != "calibration":
                    content["label"] = [int(labels[i]) for i in chosen]
                datasets.Dataset.from_dict(content).to_parquet(aside / f"{split}.parquet")
        say(f"{name}: pictures in {picture_dir(name)}")


def encoded(picture: Image.Image) -> bytes:
    """A PNG file's content."""
    content = BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def fashion() -> tuple[Grey, Grey]:
    """All pictures [70000, 28, 28], and their classes."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["dpkg-deb", "-x", str(fetch(FASHION)), place], check=True)
        folder = Path(place) / UNPACKED
        images = [_idx(folder / f"{part}-images-idx3-ubyte.gz", 16) for part in ("train", "t10k")]
        labels = [_idx(folder / f"{part}-labels-idx1-ubyte.gz", 8) for part in ("train", "t10k")]
    return np.concatenate(images).reshape(-1, SIDE, SIDE), np.concatenate(labels)


def _idx(file: Path, header: int) -> Grey:
    """The bytes after the header of an IDX file."""
    return np.frombuffer(gzip.decompress(file.read_bytes())[header:], dtype=np.uint8)


def digits() -> tuple[Grey, Grey]:
    """All pictures [1797, 28, 28], enlarged from 8 x 8, and their classes."""
    with zipfile.ZipFile(fetch(SCIKIT_LEARN)) as wheel:
        rows = np.loadtxt(BytesIO(gzip.decompress(wheel.read(DIGITS))), delimiter=",")
    small = np.round(rows[:, :-1].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for p in small
    ]
    return np.stack(large), rows[:, -1].astype(np.uint8)


if __name__ == "__main__":
    try:
        prepare_pictures()
    except FetchError as error:
        sys.exit(f"error: {error}")
