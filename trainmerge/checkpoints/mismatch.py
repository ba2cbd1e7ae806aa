"""The error of files that do not match the model of their config.json."""

from collections.abc import Sequence
from pathlib import Path

from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.weight_files import read_folder_json

COUNTS = ("num_local_experts", "num_experts")  # both say how many experts a layer has; the first one wins


def mismatch(path: Path, kind: str, unknown: Sequence[str], shapes: Sequence[str]) -> str:
    """Names of tensors that the model lacks, of other shapes, and what to do.

    Args:
        path: The checkpoint.
        kind: The model's class.
        unknown: Tensors that it has no parameter for.
        shapes: A line for each tensor of another shape.
    """
    lines = [f"{len(unknown)} tensors that the model has no parameter for: {shorten(unknown)}"]
    lines = [*(lines if unknown else []), *shapes]
    found = read_folder_json(path / "config.json")
    counts = {key: found[key] for key in COUNTS if key in found}
    if len({*counts.values()}) > 1:
        said = " and ".join(f"{key} {value}" for key, value in counts.items())
        remedy = (
            f"config.json has {said}, of which transformers takes the first: remove the one that is stale"
        )
    else:
        remedy = (
            "Tensors that transformers converts on loading, other than by stacking, concatenating or "
            "transposing, are not supported yet: if transformers loads them, save base and experts with "
            "save_pretrained(FOLDER, save_original_format=False). Tensors that the model doesn't have can be "
            "named in `ignore`"
        )
    return f"{path}: the files do not match {kind}: {'; '.join(lines)}. {remedy}."
