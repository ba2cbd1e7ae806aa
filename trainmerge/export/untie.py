"""An untied copy of a checkpoint: its embedding and its output head as two tensors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trainmerge.checkpoints import build_meta_model, locate, open_checkpoint
from trainmerge.export.side_files import copy_side_files
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.hub import folder_of
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.safetensors_format import file_order
from trainmerge.system.staging import staging

KEY = "tie_word_embeddings"


def untie(folder: str | Path, out: str | Path) -> Path:
    """Copy a checkpoint with its ties undone: each tied parameter gets a tensor of its own, of equal values.

    The copy gives the same outputs. Base and full experts must all be untied to be merged; adapters of the
    tied base fit the copy.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: the checkpoint is damaged or has no ties, or its architecture cannot be untied.
    """
    base, target = open_checkpoint(folder_of(folder)), Path(out)
    model = build_meta_model(base.path)
    ties = model.all_tied_weights_keys
    if not ties:
        raise ValueError(f"{base.path}: config.json ties no parameters; use this folder as it is")
    sources = {name: name for name in base.tensors} | _copies(
        model, ties, locate(model, base.path, base.tensors)
    )
    infos = {name: base.tensors[source] for name, source in sources.items()}
    specs = {name: (info.dtype, tuple(info.shape)) for name, info in infos.items()}
    with staging(target) as new:
        check_free_space(new, sum(info.nbytes for info in infos.values()))
        copy_side_files(base.path, new)
        (new / "config.json").write_text(json.dumps(_untied(base.config), indent=2))
        pairs = ((name, base.read(sources[name])) for name in file_order(specs))
        write_safetensors(new / "model.safetensors", specs, pairs, {"format": "pt"})
        copy = build_meta_model(new)
        names = locate(copy, new, open_checkpoint(new).tensors)
        if left := sorted(copy.all_tied_weights_keys.keys() | ties.keys() - names.values()):
            raise ValueError(
                f"{base.path}: {type(model).__name__} ties {', '.join(left)} always, so it has no untied copy"
            )
    return target


def _copies(model: nn.Module, ties: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Tensor that the files lack, since it is tied -> the one of the files that it equals."""
    homes = {parameter: name for name, parameter in names.items()}
    owner = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    tied = [alias for alias in ties if alias in every and alias not in names]
    return {alias: homes[owner[id(every[alias])]] for alias in tied}


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without ties, in all parts of a composed model."""
    parts = {
        key: _untied(value) for key, value in config.items() if isinstance(value, Mapping) and KEY in value
    }
    return {**config, **parts, KEY: False}
