"""data/: documents of the language-model suite. The scripts themselves run in `make data-lm`."""

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def lm_texts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it imports its neighbours by their plain names."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    neighbours = {"atomic", "corpora", "sources", "tasks", "texts", "lm_texts"}
    for name in neighbours & sys.modules.keys():
        monkeypatch.delitem(sys.modules, name)
    import lm_texts

    return lm_texts


def test_no_document_is_in_two_files(lm_texts: ModuleType) -> None:
    documents = [f"{i} " * 400 for i in range(300)] + ["short"] + [f"{i} " * 400 for i in range(100)]
    parts = lm_texts.split(documents, "kjv")
    assert [len(parts[part]) for part in ("test", "calibration", "train")] == [30, 100, 170]
    everything = [text for texts in parts.values() for text in texts]
    assert len(set(everything)) == len(everything) == 300
    assert all(len(text) <= lm_texts.MAX_CHARACTERS for text in everything)
    assert lm_texts.split(documents, "kjv") == parts
    assert lm_texts.split(documents, "french") != parts  # another order for another domain


def test_manual_pages_lose_their_markup(lm_texts: ModuleType) -> None:
    page = (
        '.TH LS 1\n.\\" a comment\n.SH NOM\nls \\- afficher\n.B \\-a\n\\fIfichier\\fR d\\(aquhui \\[u2014]\n'
    )
    text = lm_texts.without_roff(page)
    assert text.split() == ["NOM", "ls", "-", "afficher", "-a", "fichier", "d'uhui"]
    assert lm_texts.is_french("de la vie et le pain est bon et les uns des autres ")
    assert not lm_texts.is_french("the bread is good and the life of the others ")


def test_a_fingerprint_knows_sources_and_python(
    lm_texts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = {domain: lm_texts.fingerprint(domain) for domain in lm_texts.DOMAINS}
    assert len(set(prints.values())) == len(prints)
    monkeypatch.setattr(lm_texts, "STORIES", 11)
    assert all(lm_texts.fingerprint(domain) != before for domain, before in prints.items())
