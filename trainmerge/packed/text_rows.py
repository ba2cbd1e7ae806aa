"""Texts -> one row each: the mean of the base's last hidden states.

Legend: `N` texts, `T` tokens, `D` hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.checkpoints import Checkpoint, load_model
from trainmerge.data.classifier import pool
from trainmerge.data.examples import Example
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.media_forward import backbone

TOGETHER = 32  # texts per forward pass


@dataclass(frozen=True)
class TextRows:
    """The base's model and tokenizer."""

    module: nn.Module
    tokenize: Tokenizer

    @torch.inference_mode()
    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Rows [N, D], float32; padding does not count.

        Raises:
            ValueError: pictures or sounds without a text.
        """
        if without_text(examples):
            raise ValueError("a router reads texts, and these are pictures or sounds alone")
        own: Any = backbone(self.module)
        below = own.get_encoder() if getattr(own.config, "is_encoder_decoder", False) else own
        found: list[Tensor] = []
        for first in range(0, len(examples), TOGETHER):
            inputs = dict(self.tokenize.encode(examples[first : first + TOGETHER]).inputs)
            inputs.pop("labels", None)
            hidden = below(**inputs).last_hidden_state
            found.append(pool(hidden, inputs["attention_mask"].bool(), "mean").float())
        return torch.cat(found)


def text_rows(base: Checkpoint, max_length: int, ignore: Sequence[str]) -> TextRows:
    """Load the base. Raises ValueError as `load_model` does."""
    return TextRows(load_model(base, ignore).module, Tokenizer(str(base.path), max_length))
