"""Calibration texts that an expert writes itself, instead of a file: what to write, and who can."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example
from trainmerge.data.text_files import load_examples
from trainmerge.system.ranges import check_fields

WRITERS = "causal language model"
POOL = (
    "give `calibration` a file of texts instead: the task's own, or where there are none those of a public "
    "pool, such as wikitext-103 or C4"
)


@dataclass(frozen=True)
class Generate:
    """Texts that an expert samples from itself, once, before the fit.

    A text begins with the tokenizer's first token alone. With `data.columns.messages` the expert writes a
    chat: the user's turn after the chat template's own beginning, then the answer (Xu et al., Magpie, ICLR
    2025, arXiv 2406.08464). Every text has its own seed, made from `seed_everything`, its expert and its
    number.

    Args:
        generate: The number of texts.
        length: Most tokens that the expert writes; in a chat, per turn.
        temperature: Of the softmax that is sampled from; 1 is the expert's own distribution.
        prefixes: A file of beginnings, which the texts take in turn: a column `text`, or one per line. In a
            chat they are the user's turns.
    """

    generate: int
    length: int = 128
    temperature: float = 1.0
    prefixes: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "calibration", generate="[1, 1e6]", length="[1, 1e6]", temperature="(0, inf)")

    def __str__(self) -> str:
        return f"{self.generate} texts of its own"

    def beginnings(self) -> list[str]:
        """The texts of the file `prefixes`; none without one.

        Raises:
            ValueError: as `load_examples`.
        """
        return [] if self.prefixes is None else list(load_examples(self.prefixes, ["text"])["text"])

    def identity(self) -> str:
        """A text that identifies it and its beginnings."""
        own: dict[str, Any] = {**asdict(self), "prefixes": self.beginnings()}
        return sha256(repr(own).encode()).hexdigest()

    def placeholders(self, columns: Columns, most: int | None) -> list[Example]:
        """As many texts as it will write, `most` at most, of about their greatest length: for plans."""
        turns = 2 if columns.messages else 1
        text = "a " * (turns * self.length)
        return [Example(text)] * min(self.generate, most or self.generate)


def generate_problems(
    files: Mapping[str, str | Generate], kind: str, architecture: str, columns: Columns
) -> Iterator[str]:
    """Why experts cannot write their texts: one line for each.

    `kind` and `architecture` are the base's, as `checkpoints.output_of` names them.
    """
    others = [name for name in (columns.spans, columns.target, columns.pair, *columns.media) if name]
    for name, wanted in files.items():
        if not isinstance(wanted, Generate):
            continue
        where = f"recipe.experts.{name}.calibration"
        if kind != WRITERS:
            yield f"{where}: {architecture} is a {kind}, which writes no texts: {POOL}"
        elif others:
            yield f"{where}: an expert writes texts or chats, and data.columns has {others}: leave them out"
        elif wanted.prefixes is not None and not Path(wanted.prefixes).exists():
            yield f"{where}.prefixes: {wanted.prefixes}: no such file"
