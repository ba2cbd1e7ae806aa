"""Symbolic links in a checkpoint folder: followed within the folder, and into a hub cache's blobs.

Files of tensors are read wherever they lie (`checkpoints.weight_files`); others may be copied into an export.
"""

from pathlib import Path


def leads_outside(folder: Path, file: Path) -> bool:
    """Whether a link, the file or a folder on its way, leads out of a checkpoint folder.

    `folder` itself may be a link. A hub cache has the files of `models--NAME/snapshots/REVISION` in
    `models--NAME/blobs`, and a download of older versions links there from any folder.
    """
    try:
        place = file.resolve()
        return not (place.is_relative_to(folder.resolve()) or _is_blob(place, folder.resolve()))
    except (OSError, RuntimeError):  # a loop of links
        return True


def check_link(folder: Path, file: Path) -> None:
    """Raise ValueError if a file of a checkpoint folder is a link that leads outside."""
    if file.exists() and leads_outside(folder, file):
        raise ValueError(
            f"{file} is a link to {file.resolve()}, outside {folder}: links are followed only within a "
            "checkpoint's folder and into a hub cache. If the file belongs to the checkpoint, copy it there"
        )


def _is_blob(place: Path, folder: Path) -> bool:
    """Whether it is a blob of the folder's own hub cache, or of another model's."""
    cache = place.parent.parent
    own = folder.parent.name == "snapshots" and cache == folder.parent.parent
    return place.parent.name == "blobs" and (own or cache.name.startswith("models--"))
