"""Texts with pictures, encoded by the model's own processor."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoProcessor

from trainmerge.data.example_rows import row_counts
from trainmerge.data.examples import Example
from trainmerge.data.special_tokens import SpecialTokens
from trainmerge.system.text import reason


class Pictures:
    """Examples with a picture each -> model inputs; the processor is loaded with the first one."""

    def __init__(self, path: str, special: SpecialTokens) -> None:
        self.path, self._special = path, special
        self._rows_alone: dict[Example, dict[str, int]] = {}

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Inputs without truncation, which would split pictures."""
        pictures = [_picture(example.image) for example in examples]
        texts = [example.text for example in examples]
        done = examples[0].templated or any(self._special.present(text) for text in texts)
        options = {"add_special_tokens": False} if done else {}
        made = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt", **options)
        return dict(made)

    def rows(self, examples: Sequence[Example], inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """`Batch.rows` of encoded examples, where the inputs do not show it: rows of each example alone."""
        unknown = [name for name, counts in row_counts(inputs, len(examples), {}).items() if counts is None]
        if not unknown:
            return {}
        for example in set(examples) - self._rows_alone.keys():
            alone = self.encode([example])
            self._rows_alone[example] = {name: len(value) for name, value in alone.items() if value.dim()}
        each = [self._rows_alone[example] for example in examples]
        found = {name: tuple(rows.get(name, 0) for rows in each) for name in unknown}
        return {name: counts for name, counts in found.items() if sum(counts) == len(inputs[name])}

    @cached_property
    def _processor(self) -> Any:
        processor = load_processor(self.path)
        processor.tokenizer.padding_side = "right"
        return processor


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


def _picture(media: str | bytes | None) -> Image.Image:
    if media is None:
        raise ValueError("either all examples of an expert must have a picture, or none")
    try:
        with Image.open(BytesIO(media) if isinstance(media, bytes) else media) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        name = f"a picture of {len(media)} bytes" if isinstance(media, bytes) else media
        raise ValueError(f"{name}: not a picture that can be read") from error
