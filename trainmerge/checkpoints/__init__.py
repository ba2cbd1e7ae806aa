"""Disk <-> tensors: base models, full experts and peft adapters, checked before anything is read."""

from trainmerge.checkpoints.align import open_task_vectors
from trainmerge.checkpoints.model import LoadedModel, hollow_model, load_model
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.verify import check_finite, fingerprint

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "check_finite",
    "fingerprint",
    "hollow_model",
    "load_model",
    "open_checkpoint",
    "open_task_vectors",
]
