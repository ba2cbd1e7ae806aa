"""Encoded examples.

Legend: `B` examples, `T` tokens.
"""

from typing import NamedTuple

from torch import Tensor


class Encoded(NamedTuple):
    """The model's arguments, and the output positions that enter the loss."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, ... [B, T]; `labels` are the decoder's tokens
    mask: Tensor  # [B, T] bool


class Located(NamedTuple):
    """The size of a text after truncation."""

    length: int  # tokens
    bytes: int  # of UTF-8, of every token but the first
