"""Whether an export of this package is whole: its manifest, written last, lists its weight files' bytes.

Where a rename is not atomic, on object stores and some network file systems, a folder may be seen before all
of its files are complete. Exports of older versions list no bytes and are taken as they are.
"""

from pathlib import Path
from typing import Any

from trainmerge.system.json_file import read_json

MANIFEST = "trainmerge_manifest.json"
PATCH = "trainmerge_rest.safetensors"  # of an adapter: what no LoRA holds, as differences
PACKED = "packed.json"  # of a folder of packed experts
RECIPE = "trainmerge_recipe.yaml"
COEFFICIENTS = "trainmerge_coefficients.safetensors"


def export_manifest(folder: Path, remedy: str = "Export the run again.") -> dict[str, Any]:
    """An export's manifest; empty for another folder. Raises ValueError for a damaged one."""
    file = folder / MANIFEST
    return read_json(file, remedy) if file.is_file() else {}


def check_whole(folder: Path) -> None:
    """Raise ValueError for an export without its manifest, or with a weight file of another size."""
    if not (folder / MANIFEST).is_file():
        if (folder / RECIPE).is_file():
            raise ValueError(
                f"{folder}: an export that is not whole: {MANIFEST}, which is written last, is missing. "
                f"Export it again; if you removed that file yourself, remove {RECIPE} too"
            )
        return
    listed = read_json(folder / MANIFEST, "Export the run again.").get("bytes", {})
    if not isinstance(listed, dict):
        raise ValueError(f"{folder / MANIFEST}: `bytes` is no list of files and sizes. Export the run again.")
    inside = {path.relative_to(folder).as_posix(): path for path in (*folder.iterdir(), *folder.glob("*/*"))}
    found = {name: path.stat().st_size for name, path in inside.items() if name in listed}
    wrong = [f"{name} has {found.get(name, 0)} of {size} bytes" for name, size in listed.items()
             if found.get(name) != size]  # fmt: skip
    if wrong:
        raise ValueError(f"{folder}: an export that is not whole: {'; '.join(wrong)}. Export it again.")
