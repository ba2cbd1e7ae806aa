"""Examples -> padded model inputs, with the base's own tokenizer.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from trainmerge.data.chat import render_chat
from trainmerge.data.example_rows import row_counts
from trainmerge.data.examples import Example
from trainmerge.data.special_tokens import SpecialTokens, check_rows, embedding_rows
from trainmerge.system.atomic import seen_from
from trainmerge.system.json_file import read_json
from trainmerge.system.links import check_link
from trainmerge.system.ranges import check_option

REMEDY = "Download or save it again."
FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


class Encoded(NamedTuple):
    """The model's arguments, and the output positions that enter the loss."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, ... [B, T]; `labels` are the decoder's tokens
    mask: Tensor  # [B, T] bool


class Located(NamedTuple):
    """The size of a text after truncation."""

    length: int  # tokens
    bytes: int  # of UTF-8, of every token but the first


class Tokenizer:
    """Texts -> padded model inputs. Padding is on the right, so that positions do not change.

    Raises:
        ValueError: not a folder, or no tokenizer in it.
    """

    def __init__(self, path: str, max_length: int) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(
                f"{path}: not a folder{seen_from(path)}. Name the base's folder: its tokenizer is used."
            )
        check_option("max_length", max_length, int, "[1, inf)")
        self.path, self.max_length = path, max_length
        for name in FILES:
            check_link(folder, folder / name)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,
                padding_side="right",
                truncation_side="right",
            )
        except Exception as error:  # the file is a stranger's, and the parser's errors are of many types
            raise ValueError(
                f"{path}: no tokenizer that transformers can load in it ({error}). Code from checkpoints is "
                "never run"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # padding is masked, so any token works
        self._loaded_processor: Any = None  # for pictures; loaded with the first one
        self._rows_alone: dict[Example, dict[str, int]] = {}
        config = folder / "config.json"
        self._has_decoder = config.is_file() and read_json(config, REMEDY).get("is_encoder_decoder")
        self._rows = embedding_rows(folder)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Inputs [B, T], truncated to `max_length` and padded to the longest text."""
        return self.encode([Example(text) for text in texts]).inputs

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Inputs, truncated to `max_length` and padded to the longest example, and the loss positions."""
        if examples[0].image:
            return self._with_pictures(examples)
        spans = [example.spans for example in examples]
        texts = [example.text for example in examples]
        inputs = self._padded(
            texts, special=not examples[0].templated, offsets=any(span is not None for span in spans)
        )
        offsets = inputs.pop("offset_mapping", None)
        mask = inputs["attention_mask"].bool()
        if offsets is not None:
            mask = torch.stack([_answers(*row) for row in zip(offsets, spans, mask, strict=True)])
        if self._has_decoder:
            inputs["labels"], mask = self._targets([example.target for example in examples])
        return Encoded(inputs, mask)

    def located(self, text: str) -> Located:
        """A text's tokens and bytes after truncation; all bytes without offsets (slow tokenizers)."""
        if not self._tokenizer.is_fast:
            return Located(len(self([text])["input_ids"][0]), len(text.encode()))
        offsets = self._padded([text], offsets=True)["offset_mapping"][0].tolist()
        first, last = offsets[0][1], max(end for _, end in offsets)
        return Located(len(offsets), len(text[first:last].encode()))

    @property
    def transformers(self) -> Any:
        """The transformers tokenizer itself."""
        return self._tokenizer

    @property
    def beginning(self) -> int:
        """The token to put before a text so that its first token is predicted too."""
        known = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self.padding]
        return int(next(token for token in known if token is not None))

    @property
    def padding(self) -> int:
        """The padding token."""
        return int(self._tokenizer.pad_token_id)

    def _targets(self, targets: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """The decoder's tokens and loss positions; without targets only the start token."""
        if targets[0] is None:
            end = self._tokenizer.eos_token_id
            first = torch.full((len(targets), 1), self._tokenizer.pad_token_id if end is None else end)
            return first, torch.ones_like(first, dtype=torch.bool)
        padded = self._padded([target or "" for target in targets])
        return padded["input_ids"], padded["attention_mask"].bool()

    def _with_pictures(self, examples: Sequence[Example]) -> Encoded:
        """Encode with the model's own processor, without truncation, which would split pictures."""
        inputs = self._processed(examples)
        return Encoded(inputs, inputs["attention_mask"].bool())

    def _processed(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        pictures = [_picture(example.image) for example in examples]
        texts = [example.text for example in examples]
        done = examples[0].templated or any(self._special.present(text) for text in texts)
        options = {"add_special_tokens": False} if done else {}
        made = self._processor()(text=texts, images=pictures, padding=True, return_tensors="pt", **options)
        return dict(made)

    def picture_rows(
        self, examples: Sequence[Example], inputs: Mapping[str, Tensor]
    ) -> dict[str, tuple[int, ...]]:
        """`Batch.rows` of encoded examples, where the inputs do not show it: rows of each example alone."""
        unknown = [name for name, counts in row_counts(inputs, len(examples), {}).items() if counts is None]
        if not unknown:
            return {}
        for example in set(examples) - self._rows_alone.keys():
            alone = self._processed([example])
            self._rows_alone[example] = {name: len(value) for name, value in alone.items() if value.dim()}
        each = [self._rows_alone[example] for example in examples]
        found = {name: tuple(rows.get(name, 0) for rows in each) for name in unknown}
        return {name: counts for name, counts in found.items() if sum(counts) == len(inputs[name])}

    def _processor(self) -> Any:
        if self._loaded_processor is None:
            self._loaded_processor = load_processor(self.path)
            self._loaded_processor.tokenizer.padding_side = "right"
        return self._loaded_processor

    def longest(self, examples: Sequence[Example], limit: int) -> int:
        """Tokens of the longest example after truncation; checks only examples that may exceed `limit`."""
        long = [e.text for e in examples if len(e.text.encode()) >= limit] if self.max_length > limit else []
        return max((len(self._padded([text])["input_ids"][0]) for text in long), default=0)

    def check_rows(self, examples: Sequence[Example], together: int = 64) -> None:
        """Raise ValueError if a text has a token that the model's embedding has no row for.

        Reads the texts only if the tokenizer has such tokens.
        """
        if self._rows is None or max(self._tokenizer.get_vocab().values(), default=0) < self._rows:
            return
        for first in range(0, len(examples), together):
            self.encode(examples[first : first + together])

    def render(self, messages: Sequence[Mapping[str, str]]) -> Example:
        """A chat rendered by the model's template; only the assistant's tokens enter the loss.

        Raises:
            ValueError: the tokenizer has no template, or as `render_chat`.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(f"{self.path}: the tokenizer has no chat template; use a text column")
        return render_chat(self._tokenizer, messages)

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self._tokenizer)

    def _padded(self, texts: list[str], special: bool = True, offsets: bool = False) -> dict[str, Tensor]:
        """One row per text, special tokens added where they are missing and `special` is set."""
        done = [i for i, text in enumerate(texts) if special and self._special.present(text)]
        rest = [i for i in range(len(texts)) if i not in set(done)]
        given = self._special.completed([texts[i] for i in done]) if done else []
        parts = [(self._encoded(given, False, offsets), done)] if done else []
        parts += [(self._encoded([texts[i] for i in rest], special, offsets), rest)] if rest else []
        fillers = {"input_ids": self.padding, "token_type_ids": self._tokenizer.pad_token_type_id}
        encoded = parts[0][0] if len(parts) == 1 else _joined(parts, fillers)
        check_rows(self._tokenizer, encoded["input_ids"], self._rows)
        return encoded

    def _encoded(self, texts: list[str], special: bool, offsets: bool) -> dict[str, Tensor]:
        encoded = self._tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
            add_special_tokens=special,
            return_offsets_mapping=offsets,
        )
        return dict(encoded)


def load_processor(path: str) -> Any:
    """The model's processor for texts with pictures.

    Raises:
        ValueError: it cannot be built, usually because torchvision is missing.
    """
    try:
        return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as for the tokenizer
        raise ValueError(
            f"{path}: the processor for pictures cannot be built ({error}). transformers' own need "
            "torchvision, of the version that fits your torch"
        ) from error


def _picture(path: str | None) -> Image.Image:
    if path is None:
        raise ValueError("either all examples of an expert must have a picture, or none")
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture that can be read") from error


def _joined(
    parts: Sequence[tuple[dict[str, Tensor], list[int]]], fillers: Mapping[str, int]
) -> dict[str, Tensor]:
    """Batches and the rows that they become, in one batch: padded on the right."""
    count, longest = sum(len(rows) for _, rows in parts), max(p["input_ids"].shape[1] for p, _ in parts)
    joined = {
        key: first.new_full((count, longest, *first.shape[2:]), fillers.get(key, 0))
        for key, first in parts[0][0].items()
    }
    for part, rows in parts:
        for key, tensor in part.items():
            joined[key][torch.tensor(rows), : tensor.shape[1]] = tensor
    return joined


def _answers(offsets: Tensor, spans: tuple[tuple[int, int], ...] | None, real: Tensor) -> Tensor:
    """Positions [T] whose next token overlaps a span; all unpadded ones without spans."""
    if spans is None:
        return real
    begins, ends = offsets.unbind(-1)
    inside = torch.zeros_like(real)
    for begin, end in spans:
        inside |= (begins < end) & (ends > begin) & real
    return torch.cat([inside[1:], inside.new_zeros(1)])
