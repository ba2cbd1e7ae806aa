"""The sizes of the experts' outputs, measured before they are recorded.

Legend: `K` experts, `V` vocabulary or classes, `D` hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from trainmerge.data.batch import Asks, Batch, Kind, Outputs
from trainmerge.data.classifier import Classifier
from trainmerge.data.examples import Example
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.own_head import OwnModel
from trainmerge.model.resident import Resident
from trainmerge.system.text import shortened


class OutputSizes(NamedTuple):
    """The last dimension of each output."""

    logits: Sequence[int]  # K: each expert's V, or positions of its longest example
    hidden: Mapping[int, int]  # layer -> D
    kinds: Sequence[Kind]  # K
    labels: Sequence[int]  # K: rows of an example, where each label has one
    embedding: int = 0  # E, the width of sentence embeddings; 0 without


@torch.no_grad()
def output_sizes(
    resident: Resident, tokenizer: Tokenizer, asks: Asks, examples: Sequence[Sequence[Example]]
) -> OutputSizes:
    """The sizes of logits and hidden states, from one forward pass, of an expert without a head if any."""
    heads = resident.classifiers
    k = next((k for k, head in enumerate(heads) if head is None), 0)
    outputs = resident(resident.batch(k, examples[0][:1], tokenizer), asks.layers)
    hidden = {layer: state.shape[-1] for layer, state in outputs.hidden.items()}
    widths: list[int] = []
    kinds: list[Kind] = []
    for head, own in zip(heads, examples, strict=True):
        kinds.append(_kind(head, outputs))
        if isinstance(head, OwnModel) and head.kind in ("spans", "labels"):
            longest = max(tokenizer.encode([e]).inputs["input_ids"].shape[1] for e in own)
            widths.append(longest if head.kind == "spans" else 2)
        elif isinstance(head, OwnModel):
            widths.append(head.width)
        else:
            widths.append(outputs.logits.shape[-1] if head is None else len(head.weight))
    labels = [head.width if isinstance(head, OwnModel) else 1 for head in heads]
    embedding = 0 if outputs.embedding is None else outputs.embedding.shape[-1]
    return OutputSizes(widths, hidden, kinds, labels, embedding)


def _kind(head: Classifier | OwnModel | None, outputs: Outputs) -> Kind:
    """What a head's logits are; `outputs` are those of the model without a head, if an expert has none."""
    if isinstance(head, OwnModel):
        return head.kind
    return "classes" if head is not None else outputs.kind


def count_positions(
    resident: Resident, expert: int, examples: Sequence[Example], tokenizer: Tokenizer
) -> list[int]:
    """The number of positions of each example that its head counts.

    Raises:
        ValueError: an example has none.
    """
    if without_text(examples) and examples[0].target is None:
        return [1] * len(examples)  # one row each, whatever its size
    head = resident.classifiers[expert]
    counts = []
    for i, example in enumerate(examples):
        encoded = tokenizer.encode([example])
        if not encoded.mask.numel():
            raise ValueError(
                f"example {i} of expert {expert} is {shortened(repr(example.text), 100)}, and the tokenizer "
                f"in {tokenizer.path} makes no token of it: check that its files belong to the model"
            )
        batch = Batch(expert, encoded.inputs, encoded.mask, torch.zeros(1, dtype=torch.int64))
        mask = head.mask(batch) if isinstance(head, OwnModel) else encoded.mask
        counts.append(int(mask.sum()))
    for i, count in enumerate(counts):
        if not count:
            raise ValueError(
                f"example {i} of expert {expert} has no unmasked position in its first "
                f"{tokenizer.max_length} tokens: raise data.max_length, or remove it"
            )
    return counts
