"""The mixture that `trainmerge shrink` reads: without layers that transformers does not run."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from trainmerge.checkpoints import Checkpoint, build_meta_model, extra_layers, open_checkpoint
from trainmerge.system.hub import folder_of
from trainmerge.system.text import listed

EXTRA = "num_nextn_predict_layers"  # the setting that says how many there are


def open_mixture(checkpoint: str | Path) -> Checkpoint:
    """A checkpoint, a folder or an id on the hub, without experts of multi-token prediction.

    Nothing runs these layers, so their experts cannot be scored; and config.json has one number of experts
    for all layers. A warning names them.

    Raises:
        ValueError: as `open_checkpoint`, or transformers does not know the architecture.
    """
    base = open_checkpoint(folder_of(checkpoint))
    extra = {*extra_layers(build_meta_model(base.path), base.tensors)}
    if not any(".experts." in name for name in extra):
        return base
    warnings.warn(
        f"{base.path}: {len(extra)} tensors of multi-token prediction are left out "
        f"({listed(sorted(extra), 2)}): transformers does not run them, so their experts cannot be scored",
        stacklevel=3,
    )
    kept = {name: info for name, info in base.tensors.items() if name not in extra}
    config = {**base.config, EXTRA: 0} if EXTRA in base.config else base.config
    return replace(base, tensors=MappingProxyType(kept), config=config)
