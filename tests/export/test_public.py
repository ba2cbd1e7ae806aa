"""Cards and configurations of an export are for strangers: no path, user, secret, or markup in names."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import trainmerge as tm
from tests.fitting.test_fit import fit_world
from tests.world import write_world
from trainmerge.export.markdown import code, code_block, inline
from trainmerge.export.public import public, public_config, public_manifest, public_name
from trainmerge.report.picture import style
from trainmerge.report.steps import path_picture
from trainmerge.run.trajectory import Trajectory


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/base", "base"),
        ("/home/me/models/base/", "base"),
        ("~/base", "base"),
        (r"C:\Users\me\base", "base"),
        ("../../me/base", "base"),
        ("base", "base"),
        ("/x/hub/models--org--name/snapshots/0a1b", "org/name"),
        ("/x/a\n---\nb", "a --- b"),
        ("/", "folder"),
    ],
)
def test_a_folders_name(path: str, name: str) -> None:
    assert public_name(path) == name


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("/home/me/x/labels.json", "labels.json"),
        ("experts/mood", "experts/mood"),
        ("Head('/home/me/labels.json', scale=2.0)", "Head('labels.json', scale=2.0)"),
        (f"made in {Path.cwd()}/runs by me", "made in "),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("https://me:secret@host/x", "https://(removed)host/x"),
        ("token=hf_abcdefgh", "token=(removed)"),
        ("curl -H 'Authorization: Bearer abc.DEF-123'", "curl -H 'Authorization: Bearer (removed)'"),
        ("the bearer documents", "the bearer documents"),
        ("a/b and 1/2, x|/y", "a/b and 1/2, x|/y"),
        ("*", "*"),
        ("text", "text"),
    ],
)
def test_a_text(given: str, want: str) -> None:
    got = public(given)
    assert got == want or (want == "made in " and "/" not in got.removeprefix(want).partition("/")[0])
    assert str(Path.cwd()) not in got


@pytest.mark.parametrize("home", ["/home/me", "/home/my own"])
@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("Head('{home}/work/labels.json', scale=2.0)", "Head('labels.json', scale=2.0)"),
        ("read {home}/a/b:{home}/c.txt", "read b:c.txt"),
        ("see file://{home}/a/b and file:///data/x/y", "see b and y"),
        ("{home}", "~"),
        ("in {home}/ by x={home}", "in ~ by x=~"),
        ("https://host{home}/x", "https://host{home}/x"),
    ],
)
def test_nothing_of_a_path_in_the_home_is_left(
    home: str, given: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    assert public(given.format(home=home)) == want.format(home=home)


def test_paths_are_replaced_in_other_texts_too() -> None:
    data = {"path": "/data/my models/base", "head": "Head('/data/my models/base/x')"}
    assert public(data) == {"path": "base", "head": "Head('base/x')"}


def test_secrets_by_key() -> None:
    data = {"api_key": "0123456789", "HF_TOKEN": "0123456789", "tokenizer": "my/base", "pad_token": "<p>"}
    assert public(data) == {**data, "api_key": "(removed)", "HF_TOKEN": "(removed)"}
    assert public({"wandb_key": "0123456789", "group_key": "0123456789"}) == {
        "wandb_key": "(removed)", "group_key": "0123456789"
    }  # fmt: skip


def test_a_manifest_has_no_command() -> None:
    started = {"command": "trainmerge fit x --token hf_abcdefgh", "folder": "/home/me", "threads": 1}
    assert public_manifest({"started": started, "clip": 0.0}) == {"started": {"threads": 1}, "clip": 0.0}


def test_a_configuration_has_no_loggers_and_places() -> None:
    config = {
        "seed_everything": 3,
        "trainer": {
            "max_steps": 5,
            "logger": [{"class_path": "x.Logger", "init_args": {"name": "token=hf_abcdefgh"}}],
            "callbacks": [{"class_path": "trainmerge.StopWhenFlat"}, {"class_path": "x.Own"}],
        },
        "model": {"workspace": "/home/me/run/workspace", "clip": 1.0},
        "run": "/home/me/run",
    }
    assert public_config(config) == {
        "seed_everything": 3,
        "model": {"clip": 1.0},
        "trainer": {"max_steps": 5, "callbacks": [{"class_path": "trainmerge.StopWhenFlat"}]},
    }


def test_an_export_names_no_place_of_this_machine(tmp_path: Path) -> None:
    write_world(tmp_path / "me")
    fit_world(tmp_path / "me", tmp_path / "run", steps=1)
    shutil.copy(tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "config.yaml")
    out = tm.export_run(tmp_path / "run", tmp_path / "out")
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
        assert b"pytest" not in file.read_bytes(), file
    assert yaml.safe_load((out / "trainmerge_config.yaml").read_text())["recipe"]["base"] == "base"


NAMES = ["a|b", "<script>alert(1)", "# x", "$a$", "[x](http://y)", "*a*", "`a`", "```", "---", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_markdown_stays_a_name(name: str) -> None:
    for text in {inline(name), code(name)} - {f"`{name}`"}:
        assert "\n" not in text
        assert "<" not in text
        plain = text.replace("\\\\", "")
        for letter in "|$*[`#":
            assert plain.count(letter) == plain.count(f"\\{letter}")


def test_code_of_plain_names() -> None:
    assert code("encoder.layer.0") == "`encoder.layer.0`"


def test_a_fence_is_longer_than_any_within() -> None:
    block = code_block("a: '```'\n", "yaml")
    assert block.startswith("````yaml\n")
    assert block.endswith("\n````")


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "\ud800", "a\u202eb", " ", "n" * 3000])
def test_names_that_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    for given in ({"experts": {name: tm.Expert("x")}}, {"held_out": {name: tm.HeldOut("x")}}):
        with pytest.raises(ValueError, match="not a valid name"):
            tm.Recipe(**{"base": str(tmp_path), "experts": {"a": tm.Expert("y")}, **given})


@pytest.mark.parametrize("name", ["é", "..", "a|b", "$\\frac{$", "<b>", "```", "null", "_x", "a/b"])
def test_names_of_any_script_are_drawn(name: str, tmp_path: Path) -> None:
    with style():
        picture = path_picture([name, "b"], Trajectory(torch.arange(3), torch.rand(3, 2, 4)))
        picture.figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size
