"""Links are followed within a checkpoint's folder and into a hub cache's blobs."""

from pathlib import Path

import pytest

from trainmerge.system.links import check_link, leads_outside


def link(place: Path, to: Path | str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(to)
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "own.txt").write_text("own")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "model"


def test_links_within_the_folder(folder: Path, tmp_path: Path) -> None:
    assert not leads_outside(folder, link(folder / "a", "sub/own.txt"))
    assert not leads_outside(folder, folder / "sub" / "own.txt")
    other_name = link(tmp_path / "other", folder)
    assert not leads_outside(other_name, other_name / "a")


def test_links_that_lead_outside(folder: Path, tmp_path: Path) -> None:
    assert leads_outside(folder, link(folder / "a", tmp_path / "secret.txt"))
    assert leads_outside(folder, link(folder / "b", "../secret.txt"))
    assert leads_outside(folder, link(folder / "up", "..") / "secret.txt")
    assert leads_outside(folder, link(folder / "two", "a"))  # a link to a link
    with pytest.raises(ValueError, match="copy it there"):
        check_link(folder, folder / "a")


def test_a_loop(folder: Path) -> None:
    loop = link(folder / "loop", "loop")
    assert leads_outside(folder, loop) in (True, False)  # an error in some versions of Python
    check_link(folder, loop)  # it does not exist


def test_a_hub_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "abc").write_text("x")
    snapshot = cache / "snapshots" / "main"
    assert not leads_outside(snapshot, link(snapshot / "config.json", "../../blobs/abc"))
    assert not leads_outside(snapshot, link(snapshot / "sub" / "x", "../../../blobs/abc"))
    assert not leads_outside(tmp_path / "local", link(tmp_path / "local" / "x", cache / "blobs" / "abc"))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("secret")
    assert leads_outside(snapshot, link(snapshot / "y", tmp_path / "blobs" / "x"))
