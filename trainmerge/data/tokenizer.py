"""Examples -> padded model inputs, with the base's own tokenizer.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from trainmerge.data.examples import Example
from trainmerge.system.atomic import seen_from
from trainmerge.system.json_file import read_json
from trainmerge.system.links import check_link
from trainmerge.system.text import reason

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
                f"{path}: no tokenizer that transformers can load in it ({reason(error)}). Code from "
                "checkpoints is never run"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # padding is masked, so any token works
        self._loaded_processor: Any = None  # for pictures; loaded with the first one
        config = folder / "config.json"
        self._has_decoder = config.is_file() and read_json(config, REMEDY).get("is_encoder_decoder")

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
        pictures = [_picture(example.image) for example in examples]
        inputs = self._processor()(
            text=[example.text for example in examples], images=pictures, padding=True, return_tensors="pt"
        )
        return Encoded(dict(inputs), inputs["attention_mask"].bool())

    def _processor(self) -> Any:
        if self._loaded_processor is None:
            self._loaded_processor = load_processor(self.path)
            self._loaded_processor.tokenizer.padding_side = "right"
        return self._loaded_processor

    def longest(self, examples: Sequence[Example], limit: int) -> int:
        """Tokens of the longest example after truncation; checks only examples that may exceed `limit`."""
        long = [e.text for e in examples if len(e.text.encode()) >= limit] if self.max_length > limit else []
        return max((len(self._padded([text])["input_ids"][0]) for text in long), default=0)

    def render(self, messages: Sequence[Mapping[str, str]]) -> Example:
        """A chat rendered by the model's template; only the assistant's tokens enter the loss.

        Raises:
            ValueError: the tokenizer has no template, or the chat no assistant's turn.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(f"{self.path}: the tokenizer has no chat template; use a text column")
        whole = self._templated(messages)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = len(self._templated(messages[:turn], add_generation_prompt=True))
                spans.append((begin, len(self._templated(messages[: turn + 1]))))
        if not spans:
            raise ValueError("it has no turn with the role 'assistant'")
        return Example(whole, tuple(spans), templated=True)

    def _templated(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        return str(
            self._tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options)
        )

    def _padded(self, texts: list[str], special: bool = True, offsets: bool = False) -> dict[str, Tensor]:
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
            f"{path}: the processor for pictures cannot be built ({reason(error)}). transformers' own need "
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


def _answers(offsets: Tensor, spans: tuple[tuple[int, int], ...] | None, real: Tensor) -> Tensor:
    """Positions [T] whose next token overlaps a span; all unpadded ones without spans."""
    if spans is None:
        return real
    begins, ends = offsets.unbind(-1)
    inside = torch.zeros_like(real)
    for begin, end in spans:
        inside |= (begins < end) & (ends > begin) & real
    return torch.cat([inside[1:], inside.new_zeros(1)])
