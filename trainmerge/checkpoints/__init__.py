"""Disk <-> tensors: base models, full experts and peft adapters, checked before anything is read."""

from trainmerge.checkpoints.align import open_task_vectors
from trainmerge.checkpoints.model import LoadedModel, hollow_model, load_model
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.skeleton import Output, output_of
from trainmerge.checkpoints.verify import fingerprint, verify

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "Output",
    "fingerprint",
    "hollow_model",
    "load_model",
    "open_checkpoint",
    "open_task_vectors",
    "output_of",
    "verify",
]
