"""Disk <-> tensors: base models, full experts and peft adapters, checked before anything is read."""

from trainmerge.checkpoints.align import open_task_vectors
from trainmerge.checkpoints.model import LoadedModel, load_model
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.recompute import recompute_blocks
from trainmerge.checkpoints.skeleton import build_skeleton, locate
from trainmerge.checkpoints.verify import check_finite, fingerprint

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "build_skeleton",
    "check_finite",
    "fingerprint",
    "load_model",
    "locate",
    "open_checkpoint",
    "open_task_vectors",
    "recompute_blocks",
]
