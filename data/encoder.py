"""MiniLM-L6 as a classifier: a sentence embedding against embeddings of the label texts.

B texts, T tokens, H hidden size, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

MAX_TOKENS = 64
LOGIT_SCALE = 20.0
EVAL_BATCH_SIZE = 64


def load_encoder(folder: Path) -> nn.Module:
    """The encoder in a folder, in float32."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder."""
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """Token ids and mask, padded to the longest text and no further."""
    return tokenizer(
        list(texts), truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
    )


def pool(hidden: Tensor, mask: Tensor) -> Tensor:  # [B,T,H], [B,T] -> [B,H]
    """Mean over the mask, then unit norm."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def embed(encoder: nn.Module, batch: BatchEncoding) -> Tensor:  # -> [B,H]
    """Sentence embeddings of unit norm."""
    return pool(encoder(**batch).last_hidden_state, batch["attention_mask"])


@torch.no_grad()
def label_head(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> Tensor:  # -> [C,H]
    """The frozen head: label texts embedded by the base encoder."""
    base.eval()
    return embed(base, encode(tokenizer, labels))


def logits(encoder: nn.Module, head: Tensor, batch: BatchEncoding) -> Tensor:  # -> [B,C]
    """20 x cosine between texts and label texts."""
    return LOGIT_SCALE * embed(encoder, batch) @ head.T


@torch.inference_mode()
def accuracy(
    encoder: nn.Module,
    head: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
) -> float:
    """Share of texts whose nearest label text is the right one."""
    encoder.eval()
    # By length, so that short texts are not padded to the longest of all.
    ordered = sorted(rows, key=lambda row: len(row["text"]))
    correct = 0
    for start in range(0, len(ordered), EVAL_BATCH_SIZE):
        part = ordered[start : start + EVAL_BATCH_SIZE]
        batch = encode(tokenizer, [row["text"] for row in part])
        predicted = logits(encoder, head, batch).argmax(-1)
        correct += int((predicted == torch.tensor([row["label"] for row in part])).sum())
    return correct / len(ordered)
