"""An expert's own class over the resident model: its head is frozen, everything else is the merge.

The class is built from the expert's files. Modules that are the same in the resident model are replaced by
the resident's own, so its hooks, taps, checkpointing and shards work below every head, and the memory is that
of the heads alone.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import (
    install_all_output_capturing_hooks,
    maybe_install_capturing_hooks,
)

from trainmerge.checkpoints import OwnHead, empty_model
from trainmerge.data.batch import Batch, Kind
from trainmerge.model.graft import Graft


@dataclass(frozen=True)
class OwnModel:
    """An expert's class over the merged weights, ready for use."""

    module: PreTrainedModel
    kind: Kind
    width: int  # classes, labels or numbers
    padding: int | None  # the token that its class takes for padding, if it looks for one
    special: Tensor  # the ids of special tokens: no labels are theirs

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of its class; padding is the token that it looks for."""
        given = {name: value for name, value in batch.inputs.items() if name != "labels"}
        if self.padding is not None and "attention_mask" in given:
            absent = ~given["attention_mask"].bool()
            given["input_ids"] = given["input_ids"].masked_fill(absent, self.padding)
        return given

    def mask(self, batch: Batch) -> Tensor:
        """The positions [B, T] that enter the loss: a token classifier's have no special tokens."""
        present = batch.inputs.get("attention_mask")
        if present is None or "input_ids" not in batch.inputs:  # pictures and sounds have one row each
            return batch.mask
        mask = batch.mask if batch.mask.shape == present.shape else present.bool()  # a decoder has another
        if self.kind == "tokens":
            mask = mask & ~torch.isin(batch.inputs["input_ids"], self.special.to(mask.device))
        return mask


def whole_model(head: OwnHead, module: nn.Module, special: Tensor) -> OwnModel:
    """A checkpoint that is of the head's class itself, loaded as `module`.

    Raises:
        ValueError: see `OwnHead.padding`.
    """
    assert isinstance(module, PreTrainedModel)
    return OwnModel(module, head.outputs, head.config.num_labels or 0, head.padding, special)


def attach(
    head: OwnHead,
    resident: nn.Module,
    names: Mapping[str, str],
    special: Tensor,
    dtype: torch.dtype | None = None,
) -> OwnModel:
    """Build an expert's class over the resident model.

    Args:
        head: The expert's head.
        resident: The model with the merged weights.
        names: The base's tensor -> the resident's parameter.
        special: The ids of special tokens.
        dtype: Of its own parameters; by default the resident's.

    Raises:
        ValueError: see `OwnHead.padding`; or a sharded model whose blocks are not the expert's.
    """
    padding = head.padding
    first = next(resident.parameters())
    dtype = dtype or first.dtype
    config: Any = deepcopy(head.config)
    theirs: Any = resident.config
    config._attn_implementation = theirs._attn_implementation
    module = empty_model(head.kind, config, dtype)
    install_all_output_capturing_hooks(module)  # on blocks of its own; shared ones have the resident's
    if isinstance(resident, PreTrainedModel):
        maybe_install_capturing_hooks(resident)
    Graft(head, resident, names, module, first.device, dtype).run()
    return OwnModel(module, head.outputs, head.config.num_labels or 0, padding, special)
