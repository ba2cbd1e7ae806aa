"""Base and experts by their ids: a fit, its export and its record of commits, from a hub cache."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import trainmerge as tm
from tests.fitting.test_fit import fit_world
from tests.hub_stand_in import COMMIT, use, write_cache
from tests.world import LABELS, bert, llama, nudge, recipe, write_world
from trainmerge.cli import main
from trainmerge.run.folder import RunFolder
from trainmerge.run.hub_origins import pinned, recorded_origins
from trainmerge.run.open_run import open_run
from trainmerge.system.hub import Origin

NEXT = "f" * 40
EXPERTS = {"mood": "me/experts/mood@main", "colour": "me/colour", "animal": "me/adapter"}


def by_ids(root: Path) -> tm.Recipe:
    """The same merge, all of it by ids: a subfolder, a branch, and an adapter among them."""
    own = recipe(root)
    experts = {
        name: tm.Expert(EXPERTS[name], e.calibration, e.test, e.head) for name, e in own.experts.items()
    }
    return tm.Recipe("me/base", experts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in a cache only, texts in a folder, and a run by paths of the same models."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    fit_world(root, root / "by_paths", steps=2)
    tm.export_run(root / "by_paths", root / "merged")
    write_cache(root / "cache", "me/base", root / "base")
    write_cache(root / "cache", "me/experts", root / "experts")
    write_cache(root / "cache", "me/colour", root / "experts" / "colour")
    adapter = root / "experts" / "animal"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "me/base"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    write_cache(root / "cache", "me/adapter", adapter)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, root / "cache")
        fit_world(root, root / "run", steps=2, recipe=by_ids(root))
    return root


@pytest.fixture(autouse=True)
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, world / "cache")


def test_ids_give_the_coefficients_of_paths(world: Path) -> None:
    one, other = (
        tm.load_coefficients(world / run / "coefficients.safetensors") for run in ("run", "by_paths")
    )
    assert one().equal(other())


def test_files_keep_the_ids_as_written_and_the_manifest_the_commits(world: Path) -> None:
    saved = yaml.safe_load((world / "run" / "recipe.yaml").read_text())["recipe"]
    assert saved["base"] == "me/base"
    assert {name: expert["path"] for name, expert in saved["experts"].items()} == EXPERTS
    manifest = RunFolder(world / "run").read_manifest()
    assert manifest["hub"] == {
        "base": {"id": "me/base", "revision": COMMIT},
        "mood": {"id": "me/experts/mood", "revision": COMMIT},
        "colour": {"id": "me/colour", "revision": COMMIT},
        "animal": {"id": "me/adapter", "revision": COMMIT},
    }
    assert "hub" not in RunFolder(world / "by_paths").read_manifest()


def test_a_run_keeps_its_commit_when_the_branch_moves(world: Path, tmp_path: Path) -> None:
    newer = bert()
    nudge(newer, 5)
    shutil.copytree(world / "base", tmp_path / "newer")
    newer.save_pretrained(tmp_path / "newer")
    write_cache(world / "cache", "me/base", tmp_path / "newer", NEXT)
    try:
        own, _, opened = open_run(RunFolder(world / "run"))
        assert own.base == f"me/base@{COMMIT}"
        assert opened.folders["base"].name == COMMIT
        out = tm.export_run(world / "run", tmp_path / "out")
        assert (out / "model.safetensors").read_bytes() == (
            world / "merged" / "model.safetensors"
        ).read_bytes()
    finally:
        (world / "cache" / "models--me--base" / "refs" / "main").write_text(COMMIT)


def test_commands_take_ids(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(world / "run"), str(tmp_path / "out"), "--verify"]) == 0
    assert main(["inspect", str(world / "run")]) == 0
    assert main(["evaluate", "me/experts/mood", "--recipe", str(world / "run"), "--limit", "4"]) == 0
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    write_cache(world / "cache", "me/llama", tmp_path / "llama")
    assert main(["plan", "me/llama", "2", "--length", "8"]) == 0
    assert main(["report", str(world / "run"), "--out", str(tmp_path / "report")]) == 0
    assert "into me/base." in (tmp_path / "report" / "index.html").read_text()
    capsys.readouterr()


def test_a_fit_by_ids_resumes(world: Path, tmp_path: Path) -> None:
    fit_world(world, tmp_path / "run", steps=1, recipe=by_ids(world))
    fit_world(world, tmp_path / "run", steps=2, recipe=by_ids(world))
    assert (
        tm.load_coefficients(tmp_path / "run" / "coefficients.safetensors")()
        .detach()
        .equal(tm.load_coefficients(world / "run" / "coefficients.safetensors")().detach())
    )


def test_a_branch_that_moved_is_named_and_its_old_commit_resumes(world: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(world / "base", newer)
    write_cache(world / "cache", "me/moving", newer, "a" * 40)
    own = by_ids(world)
    fit_world(world, tmp_path / "run", steps=1, recipe=replace(own, base="me/moving"))
    nudged = bert()
    nudge(nudged, 5)
    nudged.save_pretrained(newer)
    write_cache(world / "cache", "me/moving", newer, NEXT, "other")
    words = f"base: me/moving is at commit {NEXT} now; write me/moving@{'a' * 40}"
    with pytest.raises(ValueError, match=words):
        fit_world(world, tmp_path / "run", steps=2, recipe=replace(own, base="me/moving@other"))
    fit_world(world, tmp_path / "run", steps=2, recipe=replace(own, base=f"me/moving@{'a' * 40}"))
    fit_world(world, tmp_path / "whole", steps=2, recipe=replace(own, base=f"me/moving@{'a' * 40}"))
    one, other = (
        tm.load_coefficients(tmp_path / run / "coefficients.safetensors") for run in ("run", "whole")
    )
    assert one().equal(other())


def test_an_adapter_of_another_base_in_the_cache_is_named(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    write_cache(world / "cache", "me/other", tmp_path / "other")
    adapter = tmp_path / "adapter"
    shutil.copytree(world / "experts" / "animal", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "me/other"})
    )
    with pytest.raises(ValueError, match=r"me--other.*hidden_act is 'relu', the base has 'gelu'"):
        tm.Recipe("me/base", {"animal": tm.Expert(str(adapter))}).open()


def test_one_model_twice_is_refused_without_asking() -> None:
    with pytest.raises(ValueError, match=r"me/experts/mood@main is already a"):
        tm.Recipe("me/base", {"a": tm.Expert("me/experts/mood"), "b": tm.Expert("me/experts/mood@main")})


def test_paths_stay_unless_the_recipe_is_for_strangers() -> None:
    own = tm.Recipe("/cache/x", {"a": tm.Expert("me/a"), "b": tm.Expert("/data/b")})
    found = {"base": Origin("me/base", COMMIT), "a": Origin("me/a", COMMIT)}
    assert pinned(own, found).base == "/cache/x"
    public = pinned(own, found, paths=True)
    assert public.base == f"me/base@{COMMIT}"
    assert [e.path for e in public.experts.values()] == [f"me/a@{COMMIT}", "/data/b"]


@pytest.mark.parametrize(
    "damaged", [["x"], {"base": "x"}, {"base": {"id": "a/b"}}, {"base": {"id": "a/../b", "revision": "x"}}]
)
def test_a_damaged_record_is_named(damaged: object) -> None:
    with pytest.raises(ValueError, match=r"manifest.json: `hub` is"):
        recorded_origins({"hub": damaged}, Path("manifest.json"))


assert set(EXPERTS) == set(LABELS)
