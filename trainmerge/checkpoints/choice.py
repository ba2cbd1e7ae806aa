"""Which tokenizer, chat template and generation settings a merge has: the choice alone, without files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainmerge.system.ranges import check_fields
from trainmerge.system.text import listed

BASE, UNION = "base", "union"


@dataclass(frozen=True)
class TokenRow:
    """The row of one token for models that lack it; with `force`, for all.

    Args:
        source: `base` or the expert whose row it is; None is a row of zeros.
        token: The token whose row it is, or its id there; None is the same token.
        force: All models have this row, so the merge has it as it is.
    """

    source: str | None
    token: str | int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "recipe.tokens", token="[0, inf)")


@dataclass(frozen=True)
class TokenizerChoice:
    """Where the parts of a merge's vocabulary are from.

    Args:
        tokenizer: `base`, the name of an expert, or `union`: the base's tokens, then those that only experts
            have, by expert and id.
        chat_template: `base` or an expert; None is the tokenizer's, else the one that all experts share.
        generation_config: `base` or an expert; None is the base.
        pad_to_multiple: The embedding's rows are a multiple of this number.
        by_token: Rows of experts are matched by token with the base's tokenizer too.
        equal: No model is the base: a token that some models lack has the mean of its rows in all others.
        tokens: Token -> its row, where that is not the default.
    """

    tokenizer: str = BASE
    chat_template: str | None = None
    generation_config: str | None = None
    pad_to_multiple: int | None = None
    by_token: bool = False
    equal: bool = False
    tokens: tuple[tuple[str, TokenRow], ...] = ()

    @property
    def is_default(self) -> bool:
        """Whether everything is the base's, as it is in its folder."""
        return self == TokenizerChoice()

    @property
    def moves_rows(self) -> bool:
        """Whether rows of experts are matched by token; otherwise by their number."""
        return (
            self.tokenizer != BASE or self.pad_to_multiple is not None or self.by_token or bool(self.tokens)
        )

    def check(self, experts: Sequence[str], vocabulary: str) -> None:
        """Compare with the names of the experts, and with the recipe's `vocabulary`.

        Raises:
            ValueError: lists names that no expert has, and a vocabulary that contradicts the tokenizer.
        """
        wrong = []
        for key in ("tokenizer", "chat_template", "generation_config"):
            known = [BASE, *([UNION] if key == "tokenizer" else []), *experts]
            if (name := getattr(self, key)) is not None and name not in known:
                wrong.append(f"recipe.{key} is {name!r}, which is none of {listed([*map(repr, known)], 9)}")
        wrong += self._foreign_rows(experts)
        if self.tokenizer == UNION and UNION in experts:
            wrong.append("recipe.tokenizer: an expert is named 'union' too; give it another name")
        if vocabulary == "union" and self.tokenizer == BASE:
            wrong.append(
                "recipe.vocabulary is union, and recipe.tokenizer base, which has no ids for the experts' "
                "tokens: set tokenizer: union, or leave out one of them"
            )
        if vocabulary == "shared" and self.moves_rows:
            wrong.append(
                "recipe.vocabulary is shared, which matches rows by their number; with tokenizer, "
                "pad_to_multiple or tokens they are matched by token: leave out `vocabulary`"
            )
        if wrong:
            raise ValueError("; ".join(wrong))

    def _foreign_rows(self, experts: Sequence[str]) -> Iterator[str]:
        """Rows of models that are not merged, and of zeros under a token's name."""
        known = [BASE, *experts]
        for token, row in self.tokens:
            where = f"recipe.tokens.{token}"
            if row.source is not None and row.source not in known:
                yield f"{where}: source is {row.source!r}, which is none of {listed([*map(repr, known)], 9)}"
            if row.source is None and row.token is not None:
                yield f"{where}: source is null, a row of zeros, so `token` has no effect: leave it out"
