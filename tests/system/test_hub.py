"""Ids of the hub -> folders: from the cache without a network, and from a server with the hub's interface."""

import re
from pathlib import Path

import pytest

from tests.hub_stand_in import COMMIT, Hub, serving, use, write_cache
from trainmerge.system.hub import HubId, cached_folder, folder_of, is_hub_id, origin_of, parse_id

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "README.md": b"card",
    "LICENSE": b"Apache",
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"tensorflow",
    "flax_model.msgpack": b"flax",
    "modeling.py": b"code",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "checkpoint-5/model.safetensors": b"earlier",
    "2_Dense/model.safetensors": b"layer",
    "2_Dense/config.json": b"{}",
    "sub/config.json": b"{}",
    "sub/model.safetensors": b"other weights",
    "sub/custom.py": b"code",
}
READ = {
    "config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", "2_Dense/model.safetensors",
    "2_Dense/config.json", "sub/config.json",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "", "refs/pr/3")),
        ("org/na.me-x_y/a/b@main", HubId("org/na.me-x_y", "a/b", "main")),
        ("name", None),
        ("/org/name", None),
        ("~/org/name", None),
        ("./org/name", None),
        ("../org/name", None),
        ("org/name/../x", None),
        ("org/name@../x", None),
        ("org/name/", None),
        ("org//name", None),
        ("org/na--me", None),
        (r"org\name", None),
        ("org/name@", None),
        ("", None),
    ],
)
def test_the_form_of_an_id(text: str, found: HubId | None) -> None:
    assert parse_id(text) == found


def test_a_path_is_never_asked_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folders={"org/name": tmp_path})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "there").mkdir(parents=True)
    with serving(hub, tmp_path / "cache", monkeypatch):
        assert not is_hub_id("org/there")
        assert not is_hub_id("org/name"), "below an existing folder"
        assert folder_of("org/name") == Path("org/name")
        assert folder_of(Path("x/name")) == Path("x/name")
    assert hub.asked == []


def test_a_cache_is_enough_without_a_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_cache(tmp_path / "cache", "org/name", model)
    use(monkeypatch, tmp_path / "cache")
    for text in ("org/name", "org/name@main", f"org/name@{COMMIT}"):
        assert folder_of(text) == snapshot
        assert cached_folder(text) == snapshot
    assert folder_of("org/name/sub") == snapshot / "sub"
    assert origin_of(snapshot / "sub") == ("org/name/sub", COMMIT)


def test_a_link_to_a_snapshot_has_its_origin(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(write_cache(tmp_path / "cache", "org/name", model))
    assert origin_of(tmp_path / "mine") == ("org/name", COMMIT)
    assert origin_of(tmp_path) is None


def test_neither_in_the_cache_nor_allowed_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path / "cache")
    words = "org/name@v2: no such folder in .*, and no org/name at revision v2 in the hub's cache .*/cache; "
    with pytest.raises(
        FileNotFoundError, match=f"^{words}the hub was not asked, since HF_HUB_OFFLINE is set"
    ):
        folder_of("org/name@v2")
    assert cached_folder("org/name@v2") is None


def test_only_what_a_merge_reads_is_downloaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Hub(folders={"org/name": model}), tmp_path / "cache", monkeypatch):
        folder = folder_of("org/name")
        assert origin_of(folder) == ("org/name", COMMIT)
        assert names(folder) == READ
        assert (folder / "model.safetensors").read_bytes() == b"weights"
        assert names(folder_of("org/name", allow_pickle=True)) == READ | {"pytorch_model.bin"}
        assert names(folder_of("org/name/sub")) == {"config.json", "model.safetensors"}
    use(monkeypatch, tmp_path / "cache")
    assert cached_folder("org/name") == folder


def test_a_plan_needs_no_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub(folders={"org/name": model}), tmp_path / "cache", monkeypatch):
        assert not any(name.endswith(".safetensors") for name in names(folder_of("org/name", weights=False)))


def test_one_commit_per_process_and_each_file_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folders={"org/name": model})
    with serving(hub, tmp_path / "cache", monkeypatch):
        folder_of("org/name")
        before = len(hub.asked)
        folder_of("org/name")
        folder_of("org/name", weights=False)
        assert len(hub.asked) == before


SECRET = "hf_" + "x" * 20
ERRORS = {
    "org/none": "there is none, or it is private.*hf auth login",
    "org/private": "there is none, or it is private.*hf auth login",
    "org/gated": "it is gated on 127.0.0.1.* Accept its terms there, and log in",
    "org/name@v7": "has the model without this revision. Check the part after @",
    "org/name/nowhere": "no folder nowhere with files that a merge reads",
}


@pytest.mark.parametrize("text", ERRORS)
def test_an_error_says_what_to_do_and_no_token(
    text: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folders = dict.fromkeys(("org/name", "org/private", "org/gated"), model)
    hub = Hub(folders=folders, gated={"org/gated"}, private={"org/private"})
    with serving(hub, tmp_path / "cache", monkeypatch), pytest.raises(FileNotFoundError) as caught:
        folder_of(text)
    assert re.search(ERRORS[text], str(caught.value)), caught.value
    assert str(caught.value).startswith(f"{text}: ")
    assert SECRET not in str(caught.value)
    assert f"Bearer {SECRET}" in hub.tokens, "it was sent, as the user's login is"


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub(), tmp_path / "cache", monkeypatch):
        pass
    with pytest.raises(FileNotFoundError, match=r"127.0.0.1:\d+ did not give it \(ConnectError\)"):
        folder_of("org/name")  # from the address of a server that has ended
