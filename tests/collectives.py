"""Counts the bytes that a process puts into collectives, DDP's and FSDP2's own too."""

from collections import Counter
from typing import Any

import pytorch_lightning as pl
from torch.utils._python_dispatch import TorchDispatchMode

# Which argument of an operator is what this process sends.
SENT = {"allreduce_": 0, "broadcast_": 0, "_allgather_base_": 1, "_reduce_scatter_base_": 1}


class CountBytes(TorchDispatchMode):
    """Collective -> bytes that went into it, of all calls inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d" and name != "barrier":
            sent = args[SENT[name]]  # a KeyError here is a collective that nobody meant to call
            for tensor in sent if isinstance(sent, list | tuple) else [sent]:
                self.bytes[name] += tensor.nbytes
        return func(*args, **(kwargs or {}))


class CountStep(pl.Callback):
    """Counts one step's collectives: from after a batch's end to after the next one's."""

    def __init__(self, step: int = 1) -> None:
        self.step, self.count = step, CountBytes()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            self.count.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step + 1:
            self.count.__exit__(None, None, None)
