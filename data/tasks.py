"""The classification tasks: where each one's texts are and what its classes are called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora import Corpus, OrangeTable, RatedSnippets, SpamAssassin, Uncertainty
from sources import ORANGE, PATTERN, SPAM_ASSASSIN, VADER, Source


@dataclass(frozen=True)
class Task:
    """A corpus and its label texts, by the corpus's own class names; order = class index."""

    name: str
    source: Source
    read: Callable[[Path], Corpus]
    labels: dict[str, str]


NEWS20_LABELS = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows operating system",
    "comp.sys.ibm.pc.hardware": "IBM PC hardware",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "X Window System",
    "misc.forsale": "items for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "cryptography and encryption",
    "sci.electronics": "electronics",
    "sci.med": "medicine and health",
    "sci.space": "space",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "gun politics",
    "talk.politics.mideast": "Middle East politics",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
R8_LABELS = {
    "acq": "company acquisition and merger",
    "crude": "crude oil",
    "earn": "company earnings, net profit and dividends",
    "grain": "grain, wheat and corn",
    "interest": "interest rates",
    "money-fx": "foreign exchange and currency",
    "ship": "shipping and ports",
    "trade": "international trade",
}


def _rated(name: str, stem: str, threshold: float, negative: str, positive: str) -> Task:
    labels = {"negative": negative, "positive": positive}
    return Task(name, VADER, RatedSnippets(stem, threshold), labels)


_TASKS = [
    Task("news20", ORANGE, OrangeTable("20newsgroups"), NEWS20_LABELS),
    Task("r8", ORANGE, OrangeTable("reuters-r8"), R8_LABELS),
    _rated(
        "movie",
        "movieReviewSnippets",
        0.5,
        "a negative, bad movie review",
        "a positive, great movie review",
    ),
    Task(
        "spam",
        SPAM_ASSASSIN,
        SpamAssassin(),
        {"ham": "an ordinary personal or mailing list email", "spam": "spam advertising email"},
    ),
    Task(
        "uncertain",
        PATTERN,
        Uncertainty(),
        {
            "1": "a certain factual statement",
            "-1": "a speculative uncertain statement that may possibly be true",
        },
    ),
    _rated("tweets", "tweets", 0.5, "a negative, unhappy tweet", "a positive, happy tweet"),
    _rated(
        "amazon",
        "amazonReviewSnippets",
        0.3,
        "a negative product review, a complaint",
        "a positive product review, a recommendation",
    ),
    _rated(
        "nyt",
        "nytEditorialSnippets",
        0.3,
        "a negative newspaper editorial about bad news",
        "a positive newspaper editorial about good news",
    ),
]
TASKS = {task.name: task for task in _TASKS}
GROUPS = {
    # PyPI only, so that a first try needs no npm.
    "demo": ["news20", "r8", "movie", "uncertain", "amazon"],
    "suite": [task.name for task in _TASKS],
}


def resolve_tasks(names: Sequence[str]) -> list[str]:
    """Task names with groups written out, each once, in the order given."""
    resolved = [task for name in names for task in GROUPS.get(name, [name])]
    unknown = sorted(set(resolved) - TASKS.keys())
    if unknown:
        known = ", ".join([*GROUPS, *TASKS])
        raise ValueError(f"unknown tasks: {', '.join(unknown)}; choose from {known}")
    return list(dict.fromkeys(resolved))
