"""Examples -> padded model inputs, with the base's own tokenizer.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainmerge.data.chat import render_chat
from trainmerge.data.encoded import Encoded, Located
from trainmerge.data.examples import Example
from trainmerge.data.load_tokenizer import load_tokenizer, present, takes_text
from trainmerge.data.media import MediaInputs, without_text
from trainmerge.data.padding import answers, fillers, in_one_batch, whole_length
from trainmerge.data.pictures import Pictures
from trainmerge.data.special_tokens import SpecialTokens, check_token_ids, embedding_rows
from trainmerge.data.token_examples import encode_tokens
from trainmerge.system.hub import folder_of
from trainmerge.system.json_file import read_json
from trainmerge.system.ranges import check_option


class Tokenizer:
    """Texts -> padded model inputs. Padding is on the right, so that positions do not change.

    `path` is a folder, or an id of the hub.

    Raises:
        FileNotFoundError: an id that is neither in the hub's cache nor can be downloaded.
        ValueError: not a folder, or no tokenizer in it.
    """

    def __init__(self, path: str, max_length: int) -> None:
        check_option("max_length", max_length, int, "[1, inf)")
        folder = folder_of(path, weights=False)
        self.path, self.max_length = str(folder), max_length
        self._own = load_tokenizer(self.path) if takes_text(self.path) else None
        file = folder / "config.json"
        config = read_json(file, "Download or save it again.") if file.is_file() else {}
        self._has_decoder = config.get("is_encoder_decoder")
        self._whole = whole_length(config)
        self._rows = embedding_rows(config)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Inputs [B, T], truncated to `max_length` and padded to the longest text."""
        return self.encode([Example(text) for text in texts]).inputs

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Inputs, truncated to `max_length` and padded to the longest example, and the loss positions."""
        if examples[0].tokens is not None:
            return encode_tokens(examples, self.padding)
        if without_text(examples):
            return self._media_alone(examples)
        if examples[0].image:
            return self._with_pictures(examples)
        spans, texts = [example.spans for example in examples], [example.text for example in examples]
        if any(example.pair is not None for example in examples):
            inputs = dict(self.pairs(examples))
        else:
            inputs = self._padded(
                texts, special=not examples[0].templated, offsets=any(span is not None for span in spans)
            )
        offsets = inputs.pop("offset_mapping", None)
        mask = inputs["attention_mask"].bool()
        if offsets is not None:
            mask = torch.stack([answers(*row) for row in zip(offsets, spans, mask, strict=True)])
        if self._has_decoder:
            inputs["labels"], mask = self._targets([example.target for example in examples])
        return Encoded(inputs, mask)

    def pairs(self, examples: Sequence[Example], offsets: bool = False) -> Any:
        """transformers' own encoding of pairs, or of single texts; the longer text of a pair is truncated.

        Raises:
            ValueError: `offsets` from a slow tokenizer, which knows none.
        """
        if offsets and not self.transformers.is_fast:
            raise ValueError(f"{self.path}: places in the text need a fast tokenizer: save a tokenizer.json")
        seconds = [example.pair or "" for example in examples]
        encoded = self.transformers(
            [example.text for example in examples],
            seconds if any(example.pair is not None for example in examples) else None,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=offsets,
        )
        check_token_ids(self.transformers, encoded["input_ids"], self._rows)
        return encoded

    def located(self, text: str) -> Located:
        """A text's tokens and bytes after truncation; all bytes without offsets (slow tokenizers)."""
        if not self.transformers.is_fast:
            return Located(len(self([text])["input_ids"][0]), len(text.encode()))
        offsets = self._padded([text], offsets=True)["offset_mapping"][0].tolist() or [[0, 0]]
        first, last = offsets[0][1], max(end for _, end in offsets)
        return Located(len(offsets), len(text[first:last].encode()))

    @property
    def lacks_rows(self) -> bool:
        """Whether it has tokens that the model's embedding has no row for; a text with one is an error."""
        return self._rows is not None and max(self.transformers.get_vocab().values(), default=0) >= self._rows

    @property
    def transformers(self) -> Any:
        """The transformers tokenizer itself; ValueError if the folder has none."""
        return present(self._own, self.path)

    @property
    def beginning(self) -> int:
        """The token to put before a text so that its first token is predicted too."""
        known = [self.transformers.bos_token_id, self.transformers.eos_token_id, self.padding]
        return int(next(token for token in known if token is not None))

    @property
    def special_ids(self) -> list[int]:
        """The ids of special tokens; none without a tokenizer."""
        return [] if self._own is None else list(self._own.all_special_ids)

    @property
    def padding(self) -> int:
        """The padding token."""
        return int(self.transformers.pad_token_id)

    def _targets(self, targets: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """The decoder's tokens and loss positions; without targets only the start token."""
        if targets[0] is None:
            end = self.transformers.eos_token_id
            first = torch.full((len(targets), 1), self.transformers.pad_token_id if end is None else end)
            return first, torch.ones_like(first, dtype=torch.bool)
        padded = self._padded([target or "" for target in targets])
        return padded["input_ids"], padded["attention_mask"].bool()

    def _with_pictures(self, examples: Sequence[Example]) -> Encoded:
        """Encode with the model's own processor, without truncation, which would split pictures."""
        inputs = self.pictures.encode(examples)
        return Encoded(inputs, inputs["attention_mask"].bool())

    def _media_alone(self, examples: Sequence[Example]) -> Encoded:
        """Pictures or sounds: one row of the loss per example, or the decoder's targets."""
        inputs, mask = self.media.encode(examples), torch.ones(len(examples), 1, dtype=torch.bool)
        if examples[0].target is not None:
            inputs["labels"], mask = self._targets([example.target for example in examples])
        return Encoded(inputs, mask)

    def rows(self, examples: Sequence[Example], inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """`Batch.rows` of encoded examples."""
        return {} if without_text(examples) else self.pictures.rows(examples, inputs)

    def render(self, messages: Sequence[Mapping[str, str]]) -> Example:
        """A chat rendered by the model's template; only the assistant's tokens enter the loss.

        Raises:
            ValueError: as `render_chat`.
        """
        return render_chat(self.transformers, messages)

    @cached_property
    def media(self) -> MediaInputs:
        """The encoder of pictures and sounds without text."""
        return MediaInputs(self.path)

    @cached_property
    def pictures(self) -> Pictures:
        """The encoder of texts with pictures."""
        return Pictures(self.path, self._special)

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.transformers)

    def _padded(self, texts: list[str], special: bool = True, offsets: bool = False) -> dict[str, Tensor]:
        """One row per text, special tokens added where they are missing and `special` is set."""
        done = [i for i, text in enumerate(texts) if special and self._special.present(text)]
        rest = [i for i in range(len(texts)) if i not in set(done)]
        given = self._special.completed([texts[i] for i in done]) if done else []
        parts = [(self._encoded(given, False, offsets), done)] if done else []
        parts += [(self._encoded([texts[i] for i in rest], special, offsets), rest)] if rest else []
        encoded = parts[0][0] if len(parts) == 1 else in_one_batch(parts, fillers(self.transformers))
        check_token_ids(self.transformers, encoded["input_ids"], self._rows)
        return encoded

    def _encoded(self, texts: list[str], special: bool, offsets: bool) -> dict[str, Tensor]:
        return dict(
            self.transformers(
                texts,
                truncation=True,
                max_length=self._whole or self.max_length,
                padding="max_length" if self._whole else True,
                return_tensors="pt",
                add_special_tokens=special,
                return_offsets_mapping=offsets,
            )
        )
