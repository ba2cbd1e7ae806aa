"""Disk <-> tensors: base models, full experts and peft adapters, checked before anything is read.

What needs transformers or peft is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.sources import Sources
from trainmerge.checkpoints.verify import Stamp, fingerprint, stamps, verify

if TYPE_CHECKING:
    from trainmerge.checkpoints.align import find_sources, open_task_vectors
    from trainmerge.checkpoints.model import LoadedModel, hollow_model, load_model
    from trainmerge.checkpoints.recompute import recompute_blocks
    from trainmerge.checkpoints.skeleton import Output, build_skeleton, locate, output_of

_HEAVY = {
    "find_sources": "align",
    "open_task_vectors": "align",
    "LoadedModel": "model",
    "hollow_model": "model",
    "load_model": "model",
    "recompute_blocks": "recompute",
    "Output": "skeleton",
    "build_skeleton": "skeleton",
    "locate": "skeleton",
    "output_of": "skeleton",
}

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "Output",
    "Sources",
    "Stamp",
    "build_skeleton",
    "find_sources",
    "fingerprint",
    "hollow_model",
    "load_model",
    "locate",
    "open_checkpoint",
    "open_task_vectors",
    "output_of",
    "recompute_blocks",
    "stamps",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"trainmerge.checkpoints.{_HEAVY[name]}"), name)
