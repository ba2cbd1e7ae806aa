"""How a snapshot's file is written."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from trainmerge.system.atomic import sync


class LocalFile(TorchCheckpointIO):
    """Writes a checkpoint where it is to be, and forces it to disk.

    Lightning's own class writes it to the system's temporary folder first, where a killed process leaves it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getbuffer())
        sync(Path(path))
