"""What a sentence embedder is tested on: pairs of texts, or queries and the documents that answer them.

Legend: `N` texts, `P` pairs, `Q` queries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainmerge.data.text_files import load_examples

TOGETHER = 64  # texts whose similarities with each other are taken if the file pairs none
CUT = 10  # documents per query that nDCG looks at
OPTIONAL = ("pair", "score", "relevant", "documents")
EXPERT, STS, RETRIEVAL = "expert_spearman", "spearman", f"ndcg_at_{CUT}"


class Similar(NamedTuple):
    """Texts and their pairs; in retrieval the pairs of a query and a document that answers it."""

    texts: Sequence[str]  # N
    pairs: Tensor  # [P, 2], numbers of texts
    scores: Tensor | None = None  # [P] float64, of people; None: the expert's similarities count
    documents: Tensor | None = None  # the texts that queries are compared with; None: no retrieval

    @property
    def measure(self) -> str:
        """The name of the score."""
        if self.documents is not None:
            return RETRIEVAL
        return EXPERT if self.scores is None else STS


def read_similar(file: str, column: str, count: int) -> Similar:
    """The pairs of the first `count` examples of a test file with the texts `column`, by its other columns.

    `pair` is the text that each is compared with, and `score` the similarity that people gave the two.
    Without `pair` each text is compared with the others of its 64. `relevant` makes each text a query: a list
    of the documents that answer it. All documents of the file, and those of a column `documents`, are
    searched.

    Raises:
        ValueError: a value of another type; scores without pairs, or all equal; a query without a document;
            one text alone.
    """
    data = load_examples(file, [column], optional=OPTIONAL, numbers=["score"])
    rows = [data[i] for i in range(count)]
    texts = [row[column] for row in rows]
    if "relevant" in data.column_names:
        return _retrieval(file, texts, rows)
    if "pair" not in data.column_names:
        return _all_pairs(file, texts, "score" in data.column_names)
    others = [_text(file, i, "pair", row["pair"]) for i, row in enumerate(rows)]
    pairs = torch.stack([torch.arange(count), torch.arange(count, 2 * count)], dim=1)
    scores = _scores(file, rows) if "score" in data.column_names else None
    return Similar([*texts, *others], pairs, scores)


def _all_pairs(file: str, texts: Sequence[str], scored: bool) -> Similar:
    if scored:
        raise ValueError(
            f"{file}: a score is that of a pair: add the column pair, with each text's other text"
        )
    if len(texts) < 2:
        raise ValueError(f"{file}: one text has no similarity to another: give two or more, or a column pair")
    starts = range(0, len(texts), TOGETHER)
    blocks = [torch.arange(first, min(first + TOGETHER, len(texts))) for first in starts]
    return Similar(texts, torch.cat([torch.combinations(block) for block in blocks]))


def _retrieval(file: str, queries: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Similar:
    found: dict[str, int] = {}  # document -> its number among the texts
    pairs = []
    for i, row in enumerate(rows):
        if not (relevant := _texts(file, i, "relevant", row["relevant"])):
            raise ValueError(f"{file}: example {i} has no document in 'relevant': name one, or remove it")
        for text in dict.fromkeys(relevant):
            pairs.append((i, found.setdefault(text, len(queries) + len(found))))
        for text in _texts(file, i, "documents", row.get("documents")):
            found.setdefault(text, len(queries) + len(found))
    documents = torch.arange(len(queries), len(queries) + len(found))
    return Similar([*queries, *found], torch.tensor(pairs), None, documents)


def _scores(file: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    scores = [row["score"] for row in rows]
    for i, score in enumerate(scores):
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise ValueError(f"{file}: example {i} has the score {score!r}, not a number")
    if len(set(scores)) < 2:
        raise ValueError(f"{file}: all scores are {scores[0]!r}: a correlation needs two or more")
    return torch.tensor(scores, dtype=torch.float64)


def _text(file: str, i: int, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{file}: example {i} has {value!r} for {column!r}, which is not a text")
    return value


def _texts(file: str, i: int, column: str, value: Any) -> list[str]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{file}: example {i} has {value!r} for {column!r}, which is not a list of texts")
    return [_text(file, i, column, one) for one in value or []]
