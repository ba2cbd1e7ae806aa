"""A task's examples, tokenised once for all the models that are scored on them.

Legend: `N` examples, `B` of a batch, `T` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trainmerge.data.encoded import Encoded, Located
from trainmerge.data.examples import Example
from trainmerge.data.padding import batched, fillers
from trainmerge.data.tokenizer import Tokenizer

STORED = 256 << 20  # bytes of a task's tokens; beyond, examples are tokenised for every model
OVERHEAD = 2048  # bytes of an example's tensors without their numbers, about


@dataclass
class TaskTexts:
    """Batches of a task's examples, the same as the tokenizer's own.

    Args:
        examples: The task's, N.
        tokenize: The model's tokenizer.
    """

    examples: Sequence[Example]
    tokenize: Tokenizer
    _rows: dict[int, Encoded] = field(default_factory=dict, repr=False)
    _located: dict[int, Located] = field(default_factory=dict, repr=False)
    _bytes: int = 0

    def __post_init__(self) -> None:
        pairs = sum(example.pair is not None for example in self.examples)
        media = any(example.image or example.audio for example in self.examples)
        # a text among pairs is encoded as a pair; pictures are large
        self._alone = not media and pairs in (0, len(self.examples))

    def batch(self, numbers: Sequence[int]) -> Encoded:
        """The inputs of these examples, padded to the longest [B, T], and their loss positions."""
        if not self._alone:
            return self.tokenize.encode([self.examples[i] for i in numbers])
        return batched([self._row(i) for i in numbers], fillers(self.tokenize.transformers))

    def lengths(self) -> list[int]:
        """The tokens of each example after truncation, [N]; 1 for pictures and sounds."""
        return [
            1 if e.image or e.audio else self._row(i).inputs["input_ids"].shape[1]
            for i, e in enumerate(self.examples)
        ]

    def located(self, number: int) -> Located:
        """One text's tokens and bytes after truncation."""
        if number not in self._located:
            self._located[number] = self.tokenize.located(self.examples[number].text)
        return self._located[number]

    def _row(self, number: int) -> Encoded:
        if number in self._rows:
            return self._rows[number]
        row = self.tokenize.encode([self.examples[number]])
        self._bytes += OVERHEAD + sum(tensor.nbytes for tensor in row.inputs.values())
        if self._bytes <= STORED:
            self._rows[number] = row
        return row
