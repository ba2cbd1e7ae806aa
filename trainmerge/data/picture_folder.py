"""A folder of pictures as a dataset: `pictures/*.png`, or one subfolder per class, `pictures/cat/*.png`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
}  # fmt: skip
OTHERS = {".cr2", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jp2", ".nef", ".npy", ".psd", ".raw", ".svg"}

HIDDEN = (".", "__MACOSX")  # the latter as macOS packs a folder


def picture_folder(folder: Path) -> datasets.Dataset | None:
    """The column `image` of paths, and `label` with subfolders; None if the folder is none of pictures.

    The sorted names of the subfolders are the classes 0, 1, ...; a class without pictures counts. Files are
    in the order of their names, numbers by value: the first of each class, the second of each, and so on, so
    that the first few are of all classes.

    Raises:
        ValueError: pictures in the folder and in its subfolders, or in subfolders of those; among them a
            picture of a format that is not read.
    """
    below = sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN))
    classes = [path for path in below if path.is_dir()]
    flat = _pictures(below)
    inside = [_pictures(path.iterdir()) for path in classes]
    if deeper := [
        path for own in classes for path in own.iterdir() if path.is_dir() and _pictures(path.iterdir())
    ]:
        raise ValueError(f"{folder}: {deeper[0]} has pictures: use one level of subfolders, one per class")
    if flat and any(inside):
        raise ValueError(
            f"{folder}: {flat[0].name} lies beside subfolders with pictures: use one subfolder "
            "per class, or none"
        )
    if not flat and not any(inside):
        return None
    if strange := [path for path in _files(below, classes) if path.suffix.lower() in OTHERS]:
        raise ValueError(
            f"{strange[0]}: a picture of a format that is not read: save it as PNG, or remove it"
        )
    import datasets

    if flat:
        return datasets.Dataset.from_dict({"image": [str(path.absolute()) for path in flat]})
    turns = sorted((place, label) for label, own in enumerate(inside) for place in range(len(own)))
    images = [str(inside[label][place].absolute()) for place, label in turns]
    return datasets.Dataset.from_dict({"image": images, "label": [label for _, label in turns]})


def _files(below: Iterable[Path], classes: Iterable[Path]) -> list[Path]:
    return sorted([*below, *(path for own in classes for path in own.iterdir())])


def _pictures(paths: Iterable[Path]) -> list[Path]:
    """The pictures among them that are not hidden; a link to nowhere is one, which cannot be read."""
    shown = [path for path in paths if not path.name.startswith(HIDDEN) and not path.is_dir()]
    found = [path for path in shown if path.suffix.lower() in SUFFIXES]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
