"""Texts -> token ids: special tokens once, and no id beyond the model's embedding."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainmerge.system.plain_data import text_settings


def embedding_rows(config: Mapping[str, Any]) -> int | None:
    """The rows of a model's embedding, if its config.json has them."""
    rows = text_settings(config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def check_token_ids(tokenizer: Any, ids: Tensor, rows: int | None) -> None:
    """Raise ValueError for a token id that the model's embedding of `rows` rows has no row for."""
    if rows is None or not ids.numel() or (largest := int(ids.max())) < rows:
        return
    raise ValueError(
        f"{tokenizer.name_or_path}: the tokenizer writes token {largest} "
        f"{tokenizer.convert_ids_to_tokens(largest)!r}, but config.json gives the embedding {rows} rows "
        f"(vocab_size), 0 to {rows - 1}: use the tokenizer that belongs to this model, or resize the "
        "embeddings of base and experts to it (model.resize_token_embeddings)"
    )


class SpecialTokens:
    """The tokens that a tokenizer puts around every text."""

    def __init__(self, tokenizer: Any) -> None:
        around = tokenizer("x")["input_ids"]
        inside = tokenizer("x", add_special_tokens=False)["input_ids"]
        starts = range(len(around) - len(inside) + 1)
        at = next((i for i in starts if inside and around[i : i + len(inside)] == inside), None)
        self.before, self.after = "", ""
        if at is not None:
            self.before = "".join(tokenizer.convert_ids_to_tokens(around[:at]))
            self.after = "".join(tokenizer.convert_ids_to_tokens(around[at + len(inside) :]))

    def present(self, text: str) -> bool:
        """Whether the text already begins with them, as a rendered chat does."""
        return bool(self.before) and text.startswith(self.before)

    def completed(self, texts: Sequence[str]) -> list[str]:
        """Texts that begin with the tokens before, with those after at their ends too."""
        return [text if text.rstrip().endswith(self.after) else text + self.after for text in texts]
