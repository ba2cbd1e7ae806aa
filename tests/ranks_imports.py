"""What the server of ranks imports before it forks."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # in a rank, Triton's kernels run in its interpreter

import peft  # noqa: F401
import pytorch_lightning  # noqa: F401
import torch
import torch.distributed.fsdp
import torchjd.aggregation  # noqa: F401
import torchmetrics  # noqa: F401
import transformers  # noqa: F401

import tests.world  # noqa: F401
import trainmerge.cli.fit
import trainmerge.export.export  # noqa: F401

torch.set_num_threads(1)  # threads do not survive a fork; each rank chooses its own number after it
