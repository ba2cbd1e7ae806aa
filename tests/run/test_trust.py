"""Reading the files of a run imports nothing that the user did not name."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

import trainmerge as tm
from trainmerge.cli import main
from trainmerge.run.trust import check_classes, class_paths, foreign_modules, of_a_run, trusting

MODULE = "a_strangers_module"
OWN = f"{MODULE}.Own"
PLUG_IN = """
from dataclasses import dataclass
from pathlib import Path
import trainmerge as tm
Path(__file__).with_name("imported").touch()
@dataclass(frozen=True)
class Own(tm.Ties):
    pass
"""


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stranger's run, with a module of theirs on the path."""
    (tmp_path / f"{MODULE}.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Path(shutil.copytree(finished, tmp_path / "run"))
    sys.modules.pop(MODULE, None)


def edit(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    change(content["recipe"])
    (run / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def own(recipe: dict[str, Any]) -> None:
    recipe["preprocess"] = [{"class_path": OWN}]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "preprocess": own,
    "a bare name": lambda recipe: recipe.update(preprocess=[OWN]),
    "head": lambda recipe: recipe["experts"]["mood"].update(head={"class_path": OWN}),
    "a setting of ours": lambda recipe: recipe.update(
        preprocess=[{"class_path": "trainmerge.Ties", "init_args": {"density": {"class_path": OWN}}}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_strangers_recipe_imports_nothing(run: Path, change: str) -> None:
    edit(run, CHANGES[change])
    with pytest.raises(ValueError, match=rf"{MODULE}|not allowed"):
        tm.export_run(run, run.parent / "out")
    assert not (run.parent / "imported").exists()


@pytest.mark.parametrize("command", ["export", "evaluate", "report", "inspect", "allocate", "pareto"])
def test_every_command_refuses(run: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, own)
    out = [str(run.parent / "out")] if command in ("export", "allocate") else []
    assert main([command, str(run), *out]) == 1
    assert f"--trust {MODULE}" in capsys.readouterr().err
    assert not (run.parent / "imported").exists()


def test_a_manifest_with_an_objective_of_another_module(run: Path) -> None:
    text = (run / "manifest.json").read_text().replace("trainmerge.Entropy", f"{MODULE}.Own")
    (run / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"--trust {MODULE}"):
        tm.export_run(run, run.parent / "out")


def test_the_remedy_works(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, own)
    assert main(["export", str(run), str(run.parent / "out"), "--trust", MODULE]) == 1
    assert "recipe.yaml differs" in capsys.readouterr().err  # imported, then compared with the manifest
    assert (run.parent / "imported").exists()


@pytest.mark.usefixtures("run")
def test_a_plug_in_that_the_program_imported_is_known() -> None:
    with pytest.raises(ValueError, match="trust"):
        check_classes({"class_path": OWN}, "recipe.yaml")
    __import__(MODULE)
    check_classes({"class_path": OWN}, "recipe.yaml")
    with pytest.raises(ValueError, match="trust"):
        check_classes({"class_path": f"{MODULE}.Path"}, "recipe.yaml")  # imported, but no plug-in


def test_a_runs_configuration_imports_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"recipe": yaml.safe_load((run / "recipe.yaml").read_text())["recipe"]}
    content["trainer"] = {"callbacks": [{"class_path": OWN}]}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", str(run / "config.yaml"), str(run)]) == 1
    assert f"--trust {MODULE}" in capsys.readouterr().err
    content["trainer"] = {"callbacks": OWN}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", str(run / "config.yaml"), str(run)]) == 1
    assert not (run.parent / "imported").exists()


def test_a_configuration_kept_in_the_run_folder_fits_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    content = {"recipe": yaml.safe_load((run / "recipe.yaml").read_text())["recipe"], "report": False}
    own(content["recipe"])
    content |= {"trainer": {"accelerator": "cpu", "max_steps": 1}, "data": {"max_length": 16}}
    mine = run.parent / "new" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text(yaml.safe_dump(content))
    for last in (1, 2):
        assert main(["fit", str(mine), str(mine.parent), f"--trainer.max_steps={last}"]) == 0
        assert sys.modules.pop(MODULE)
        (run.parent / "imported").unlink()
    capsys.readouterr()
    content["recipe"]["preprocess"] += [{"class_path": "another_module.Own"}]  # the run does not name it
    mine.write_text(yaml.safe_dump(content))
    assert main(["fit", str(mine), str(mine.parent)]) == 1
    assert "--trust another_module (in a program" in capsys.readouterr().err
    assert main(["fit", str(mine.parent / "config.yaml"), str(mine.parent)]) == 1
    assert f"--trust {MODULE}" in capsys.readouterr().err
    assert not (run.parent / "imported").exists()


def test_the_current_folder_comes_last(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("open('imported', 'w')")
    command = [sys.executable, "-m", "trainmerge.cli", "report", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "not a run folder" in done.stderr
    assert not (tmp_path / "imported").exists()


def test_what_is_a_runs(run: Path, tmp_path: Path) -> None:
    assert of_a_run(run / "config.yaml")
    assert not of_a_run(tmp_path / "mine.yaml")


def test_names_in_data() -> None:
    data = {"a": [{"class_path": "x.Y", "init_args": {"b": {"class_path": "torch.optim.Adam"}}}]}
    assert list(class_paths(data)) == ["x.Y", "torch.optim.Adam"]
    assert foreign_modules(data) == ["x"]


@pytest.mark.parametrize("name", ["a-b", "", "../x"])
def test_what_is_trusted_is_a_modules_name(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a module"), trusting(name), nullcontext():
        pass


def test_an_endless_name_of_a_class_is_quoted_in_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names a{600}\.\.\., which is not part of trainmerge") as error:
        check_classes({"class_path": "a" * 5000 + ".B"}, tmp_path / "recipe.yaml")
    assert len(str(error.value)) < 2000 + len(str(tmp_path))
