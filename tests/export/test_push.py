"""Uploads go to a stand-in of the hub, never to a real one: whole exports only, and no token is shown."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import trainmerge as tm
from tests.fitting.test_fit import fit_world
from tests.hub_stand_in import Hub, serving, use
from tests.world import write_world
from trainmerge.cli import main
from trainmerge.export.push import plan_upload
from trainmerge.system.safetensors_file import sha256

OLD_KEYWORD = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub 2.4
TOKEN = "hf_" + "y" * 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    fit_world(root, root / "run", steps=0)
    return tm.export_run(root / "run", root / "merged")


@pytest.fixture
def merged(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return Path(shutil.copytree(made, tmp_path / "merged"))


def test_every_file_of_the_export_arrives(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (merged / "notes.txt").write_text("mine")
    hub = Hub()
    with serving(hub, tmp_path / "cache", monkeypatch) as address:
        assert main(["push", str(merged), "org/name"]) == 0
    shown = capsys.readouterr()
    assert f"uploaded: {address}/org/name\n" in shown.out
    files = {path.name: path.read_bytes() for path in merged.iterdir() if path.name != "notes.txt"}
    assert hub.commits == {"org/name": files}
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}
    assert TOKEN not in shown.out + shown.err
    assert [one["name"] for one in hub.created] == ["name"]


@OLD_KEYWORD
@pytest.mark.parametrize("part", [None, 10_000], ids=["one request", "parts"])
def test_weights_go_by_git_lfs_and_are_checked(
    part: int | None, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub = Hub(large=".safetensors", part=part)
    with serving(hub, tmp_path / "cache", monkeypatch):
        tm.push(merged, "org/name")
        first = [asked for asked in hub.asked if asked.startswith("PUT")]
        tm.push(merged, "org/again")
    assert hub.commits["org/name"] == {path.name: path.read_bytes() for path in merged.iterdir()}
    assert hub.commits["org/again"] == hub.commits["org/name"]
    weights = {sha256(path): path.stat().st_size for path in merged.glob("*.safetensors")}
    assert len(weights) == 2  # of the model, and its coefficients
    assert sorted(hub.verified) == sorted(weights)
    wanted = {oid: 1 if part is None else -(-size // part) for oid, size in weights.items()}
    assert {oid: sum(f"/{oid}" in asked for asked in first) for oid in weights} == wanted
    assert sum(asked.startswith("PUT") for asked in hub.asked) == len(
        first
    )  # what is there is not sent again


@OLD_KEYWORD
def test_a_hub_that_takes_no_large_file_is_in_words(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub = Hub(large=".safetensors", full=True)
    with (
        serving(hub, tmp_path / "cache", monkeypatch),
        pytest.raises(ConnectionError, match=r"not uploaded to .* \(status 507\)"),
    ):
        tm.push(merged, "org/name")
    assert hub.commits == {}


def test_a_dry_run_asks_nothing(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (merged / "notes.txt").write_text("mine")
    hub = Hub()
    with serving(hub, tmp_path / "cache", monkeypatch):
        assert main(["push", str(merged), "org/name", "--private", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert hub.asked == []
    for word in (
        "/org/name (private)",
        "model.safetensors",
        "library_name",
        "transformers",
        "not uploaded: notes.txt",
    ):
        assert word in shown, word
    assert f"{(merged / 'model.safetensors').stat().st_size:,}" in shown


def test_private_stays_private(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folders={"org/open": merged, "org/own": merged}, hidden={"org/own"})
    with serving(hub, tmp_path / "cache", monkeypatch):
        with pytest.raises(PermissionError, match=r"exists on .* and is public: nothing was uploaded"):
            tm.push(merged, "org/open", private=True)
        assert hub.commits == {}
        tm.push(merged, "org/own", private=True)
    assert hub.commits.keys() == {"org/own"}
    assert [one["visibility"] for one in hub.created] == ["private", "private"]


@pytest.mark.parametrize(
    ("repository", "problem"),
    [
        ("org/denied", "does not let you write there. Log in with an account that may"),
        ("org/broken", r"not uploaded to 127.0.0.1:\d+ \(status 400\)"),
    ],
)
def test_a_refusal_is_in_words(
    repository: str, problem: str, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(Hub(refused={"org/denied": 403, "org/broken": 400}), tmp_path / "cache", monkeypatch),
        pytest.raises(OSError, match=problem) as caught,
    ):
        tm.push(merged, repository)
    assert TOKEN not in str(caught.value)


def test_offline_says_so(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path / "cache")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        tm.push(merged, "org/name")


@pytest.mark.parametrize("name", ["name", "org/name/sub", "org/name@v1", "../name", "/org/name", ""])
def test_names_that_are_none(name: str, merged: Path) -> None:
    with pytest.raises(ValueError, match="write org/name"):
        plan_upload(merged, name)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "trainmerge_manifest.json").unlink(), "not whole"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "not whole"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing or was changed"),
        (lambda folder: (folder / "README.md").write_text("mine"), "README.md is missing or was changed"),
    ],
)
def test_a_folder_that_is_not_the_whole_export(damage, problem: str, merged: Path) -> None:
    damage(merged)
    with pytest.raises(ValueError, match=problem):
        plan_upload(merged, "org/name")


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        plan_upload(tmp_path / "nothing", "org/name")
    with pytest.raises(ValueError, match="not an export of trainmerge"):
        plan_upload(tmp_path, "org/name")


def test_a_manifest_that_names_files_elsewhere(merged: Path) -> None:
    (merged.parent / "secret.txt").write_text("x")
    manifest = json.loads((merged / "trainmerge_manifest.json").read_text())
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
    manifest["files"]["../secret.txt"] = digest
    (merged / "trainmerge_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"secret\.txt is missing or was changed"):
        plan_upload(merged, "org/name")
