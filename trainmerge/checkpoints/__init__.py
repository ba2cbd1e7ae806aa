"""Disk <-> tensors: base models, full experts and peft adapters, checked before anything is read.

What needs transformers or peft is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.sources import Sources
from trainmerge.checkpoints.verify import Stamp, check_finite, fingerprint, stamps

if TYPE_CHECKING:
    from trainmerge.checkpoints.align import find_sources, open_task_vectors
    from trainmerge.checkpoints.model import LoadedModel, load_model

_HEAVY = {
    "find_sources": "align",
    "open_task_vectors": "align",
    "LoadedModel": "model",
    "load_model": "model",
}

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "Sources",
    "Stamp",
    "check_finite",
    "find_sources",
    "fingerprint",
    "load_model",
    "open_checkpoint",
    "open_task_vectors",
    "stamps",
]


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"trainmerge.checkpoints.{_HEAVY[name]}"), name)
