"""An expert writes its own calibration examples: texts, or chats of one question and its answer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from trainmerge.checkpoints import output_of_class
from trainmerge.data.chat import around_turn
from trainmerge.data.columns import Columns
from trainmerge.data.generate import Generate
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.sampling import sample_tokens, seed_of

ATTEMPTS = 8  # of a text that comes out blank


@dataclass(frozen=True)
class Writer:
    """Writes with a module that has one expert's weights.

    Args:
        module: A causal language model.
        tokenize: The merge's tokenizer.
        wanted: What to write.
        columns: The columns that the examples will be read by.
        seed: The seed of the data and the expert's name, as one text.
    """

    module: nn.Module
    tokenize: Tokenizer
    wanted: Generate
    columns: Columns
    seed: str

    def rows(self) -> list[dict[str, Any]]:
        """The examples as rows of a JSONL file.

        Raises:
            ValueError: a text stays blank after some attempts; or a chat template that rejects a turn.
        """
        given = self.wanted.beginnings()
        begun = [given[i % len(given)] if given else "" for i in range(self.wanted.generate)]
        if not self.columns.messages:
            own = self._filled(lambda rows, seeds: self._texts([begun[i] for i in rows], seeds), "text")
            return [{self.columns.text or "text": text} for text in own]
        asked = (
            begun if given else self._filled(lambda rows, seeds: self._turns([[]] * len(rows), seeds), "user")
        )
        before = [[{"role": "user", "content": question}] for question in asked]
        told = self._filled(lambda rows, seeds: self._turns([before[i] for i in rows], seeds), "assistant")
        return [
            {self.columns.messages: [*turns, {"role": "assistant", "content": answer}]}
            for turns, answer in zip(before, told, strict=True)
        ]

    def _filled(self, write: Callable[[Sequence[int], Sequence[int]], Sequence[str]], what: str) -> list[str]:
        """One text per number; blank ones are written again with another seed."""
        found: dict[int, str] = {}
        for attempt in range(ATTEMPTS):
            rows = [i for i in range(self.wanted.generate) if i not in found]
            seeds = [seed_of(f"{self.seed} {what} {i} {attempt}") for i in rows]
            written = write(rows, seeds) if rows else []
            found |= {i: text for i, text in zip(rows, written, strict=True) if text.strip()}
        if lost := self.wanted.generate - len(found):
            raise ValueError(
                f"calibration: {lost} of {self.wanted.generate} texts ({what}) came out blank {ATTEMPTS} "
                "times: give `prefixes`, or a file of texts"
            )
        return [found[i] for i in range(self.wanted.generate)]

    def _texts(self, beginnings: Sequence[str], seeds: Sequence[int]) -> list[str]:
        own = self.tokenize.transformers
        prompts = [
            own(begun)["input_ids"] if begun else [self.tokenize.beginning] for begun in beginnings
        ]  # with what the tokenizer puts before a text
        ends = ends_of(self.module, self.tokenize)
        prompts = [row[:-1] if row[-1] in self._special and len(row) > 1 else row for row in prompts]
        written = self._sample(prompts, seeds, ends)
        return [begun + self._words(tokens) for begun, tokens in zip(beginnings, written, strict=True)]

    def _turns(self, chats: Sequence[Sequence[dict[str, str]]], seeds: Sequence[int]) -> list[str]:
        """The next turn of each chat: the user's of an empty one, else the assistant's."""
        own, role = self.tokenize.transformers, "assistant" if chats[0] else "user"
        around = [around_turn(own, chat, role) for chat in chats]
        prompts = [own(opening, add_special_tokens=False)["input_ids"] for opening, _ in around]
        closing = around[0][1].strip()
        first = {*own(closing, add_special_tokens=False)["input_ids"][:1]}
        ends = ends_of(self.module, self.tokenize) | first & self._special
        written = self._sample(prompts, seeds, ends)
        return [self._turn(tokens, closing) for tokens in written]

    def _turn(self, tokens: Sequence[int], closing: str) -> str:
        """A turn's content: up to the template's text that closes it, without special tokens."""
        text = self._words(tokens)
        return str(re.split(re.escape(closing), text)[0] if closing else text).strip()

    def _words(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenize.transformers.decode([t for t in tokens if t not in self._special]))

    @cached_property
    def _special(self) -> set[int]:
        own = self.tokenize.transformers
        added = {i for i, token in own.added_tokens_decoder.items() if token.special}
        return added | {*own.all_special_ids}

    def _sample(self, prompts: list[list[int]], seeds: Sequence[int], ends: set[int]) -> list[list[int]]:
        """What the model writes after the prompts, within the length of the examples."""
        module: Any = self.module
        limit = output_of_class(type(module), module.config).positions.text
        most = min(self.tokenize.max_length, limit or self.tokenize.max_length)
        kept = [row[: max(1, most - 1)] for row in prompts]
        length = max(1, min(self.wanted.length, most - max(map(len, kept))))
        padding, temperature = self.tokenize.padding, self.wanted.temperature
        return sample_tokens(self.module, kept, seeds, length, ends, padding, temperature)


def ends_of(module: Any, tokenize: Tokenizer) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's own settings."""
    given, own = module.generation_config.eos_token_id, tokenize.transformers.eos_token_id
    ends = [*(given if isinstance(given, list) else [given]), own]
    return {int(end) for end in ends if end is not None}
