"""A merge again from its card alone: the same bytes, or an error that names what differs."""

import base64
import json
import shutil
from pathlib import Path

import pytest

import trainmerge as tm
from tests.fitting.test_fit import fit_world
from tests.hub_stand_in import COMMIT, Hub, serving, use, write_cache
from tests.world import recipe, write_world
from trainmerge.cli import main
from trainmerge.coefficients.layout import Grouping
from trainmerge.export import card_block
from trainmerge.export.card_block import Block, block_text, read_block
from trainmerge.export.export import export_run

NAMES = ("base", "mood", "colour", "animal")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learned merges of models in a hub cache, one by magnitudes, and their exports."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    for name in NAMES:
        folder = root / "base" if name == "base" else root / "experts" / name
        write_cache(root / "cache", f"org/{name}", folder)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, root / "cache")
        for name, methods in {"plain": [], "ties": [tm.Dare(0.3, seed=4), tm.Ties(0.4)]}.items():
            own = recipe(root, preprocess=methods, grouping=Grouping("block", exclude=["pooler.*"]))
            experts = {
                k: tm.Expert(f"org/{k}", e.calibration, e.test, e.head) for k, e in own.experts.items()
            }
            by_ids = tm.Recipe("org/base", experts, own.preprocess, own.grouping)
            fit_world(root, root / "runs" / name, steps=2, recipe=by_ids)
            tm.export_run(root / "runs" / name, root / name)
        tm.export_run(root / "runs" / "ties", root / "half", dtype="bfloat16", shard_size="40KB")
    return root


@pytest.fixture(autouse=True)
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, world / "cache")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors")}


@pytest.mark.parametrize("name", ["plain", "ties", "half"])
@pytest.mark.parametrize("alone", [True, False], ids=["card", "folder"])
def test_a_card_or_an_export_gives_the_same_bytes(
    name: str, alone: bool, world: Path, tmp_path: Path
) -> None:
    source = world / name
    if alone:  # nothing else of it is there
        (tmp_path / "card").mkdir()
        source = Path(shutil.copy(world / name / "README.md", tmp_path / "card"))
    assert main(["rebuild", str(source), str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(world / name)
    for file in ("config.json", "README.md", "trainmerge_recipe.yaml", "trainmerge_coefficients.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (world / name / file).read_bytes(), file
    again = tm.rebuild(tmp_path / "out", tmp_path / "again")  # a rebuilt one is an export itself
    assert weights(again) == weights(world / name)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".rebuild")) == []


def test_a_stranger_downloads_the_models(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        f"org/{name}": world / "cache" / f"models--org--{name}" / "snapshots" / COMMIT for name in NAMES
    }
    with serving(Hub(folders=folders), tmp_path / "cache", monkeypatch):
        tm.rebuild(world / "plain" / "README.md", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(world / "plain")


def test_folders_without_an_id_are_found_by_their_names(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_world(world, tmp_path / "run", steps=0)
    export_run(tmp_path / "run", tmp_path / "merged")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match=r"names base \(base\), mood \(mood\), .* without an id"):
        tm.rebuild(tmp_path / "merged" / "README.md", "out")
    Path("base").symlink_to(world / "base")
    for name in NAMES[1:]:
        Path(name).symlink_to(world / "experts" / name)
    assert weights(tm.rebuild(tmp_path / "merged" / "README.md", "out")) == weights(tmp_path / "merged")
    assert {path.name for path in Path().iterdir()} >= {"out", *NAMES}


def changed(world: Path, place: Path, old: str, new: str) -> Path:
    text = (world / "plain" / "README.md").read_text()
    assert old in text
    place.write_text(text.replace(old, new))
    return place


def test_a_file_that_differs_is_named_and_nothing_is_left(world: Path, tmp_path: Path) -> None:
    manifest = json.loads((world / "plain" / "trainmerge_manifest.json").read_text())
    digest = manifest["files"]["model.safetensors"]
    card = changed(world, tmp_path / "README.md", digest, "0" * 64)
    with pytest.raises(ValueError, match=r"README.md: model.safetensors has another SHA-256"):
        tm.rebuild(card, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["README.md"]


def test_other_weights_are_named(world: Path, tmp_path: Path) -> None:
    manifest = json.loads((world / "plain" / "trainmerge_manifest.json").read_text())
    digest = manifest["run"]["checksums"]["colour"]["model.safetensors"]
    card = changed(world, tmp_path / "README.md", digest, "0" * 64)
    with pytest.raises(ValueError, match="the weights of colour are not those of the merge"):
        tm.rebuild(card, tmp_path / "out")


def test_damaged_coefficients_are_named(world: Path, tmp_path: Path) -> None:
    card = changed(world, tmp_path / "README.md", "mpmZPp", "mpmZPq")
    with pytest.raises(ValueError, match="its coefficients have another SHA-256"):
        tm.rebuild(card, tmp_path / "out")


def test_a_method_that_reads_examples_is_refused(world: Path, tmp_path: Path) -> None:
    card = changed(
        world, tmp_path / "README.md", "preprocess: []", "preprocess: [{class_path: trainmerge.Fisher}]"
    )
    with pytest.raises(ValueError, match=r"Fisher reads calibration examples, .* cannot be rebuilt"):
        tm.rebuild(card, tmp_path / "out")


def test_a_checkpoint_of_a_tasks_class_is_refused(world: Path, tmp_path: Path) -> None:
    first = '"trainmerge_rebuild": 1,'
    card = changed(world, tmp_path / "README.md", first, f'{first} "task": "mood",')
    with pytest.raises(ValueError, match=r"the class and head of the expert mood \(export --task\)"):
        tm.rebuild(card, tmp_path / "out")


def test_a_strangers_card_imports_nothing(world: Path, tmp_path: Path) -> None:
    card = changed(world, tmp_path / "README.md", "preprocess: []", "preprocess: [{class_path: this.Zen}]")
    with pytest.raises(ValueError, match=r"names this.Zen, which is not part of trainmerge"):
        tm.rebuild(card, tmp_path / "out")


def test_large_coefficients_stay_beside_the_card(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_block, "LARGEST", 10)
    merged = tm.export_run(world / "runs" / "plain", tmp_path / "merged")
    assert "base64" not in (merged / "README.md").read_text()
    assert weights(tm.rebuild(merged / "README.md", tmp_path / "one")) == weights(merged)
    (tmp_path / "card").mkdir()
    card = shutil.copy(merged / "README.md", tmp_path / "card")
    with pytest.raises(FileNotFoundError, match=r"Put the export's trainmerge_coefficients\.safetensors"):
        tm.rebuild(card, tmp_path / "two")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# A card\n", "it lacks the recipe"),
        ("```yaml\nrecipe: {}\n```\n", "it lacks the block with the checksums"),
        ('```yaml\nrecipe: {}\n```\n```json\n{"trainmerge_rebuild": 2}\n```\n', "a later version"),
        ('```yaml\nrecipe: {}\n```\n```json\n{"trainmerge_rebuild": 1}\n```\n', "is damaged"),
        ('```yaml\nrecipe: {}\n```\n```json\n{"trainmerge_rebuild": \n```\n', "not valid JSON"),
    ],
)
def test_other_cards_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=problem):
        tm.rebuild(tmp_path / "README.md", tmp_path / "out")


def test_a_block_is_read_as_it_was_written() -> None:
    block = Block({"model```.safetensors": "1"}, {"base": {"config.json": "2"}}, "3", bytes(range(256)) * 9)
    card = f"```yaml\nrecipe: {{}}\n```\n\n{block_text(block)}\n"
    assert read_block(card, Path("x")) == block
    assert max(len(line) for line in block_text(block).splitlines()) < 120
    assert base64.b64encode(block.content)[:90].decode() in card
