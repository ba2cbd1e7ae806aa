"""The wheel in an environment of its own, away from the repository: command, types, a fit.

The environment borrows the dependencies of this one, so nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.cli.test_cli import write_config
from tests.lower_bounds import oldest
from tests.world import write_world

ROOT = Path(__file__).parents[1]

MISTYPED = """import trainmerge as tm

recipe = tm.Recipe(base="base", experts={"a": tm.Expert("a", weight=2.0)})
grouping: tm.Grouping = recipe.grouping
tm.Expert("a", weight="two")
"""
DEPENDENCIES = """[mypy]
strict = True
[mypy-torch.*,transformers.*,pytorch_lightning.*,datasets.*,peft.*,torchmetrics.*,jsonargparse.*,rich.*,PIL.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-safetensors.*,yaml.*,lightning_fabric.*,numpy.*]
follow_imports = skip
ignore_missing_imports = True
"""


def run(*command: object, cwd: Path, code: int = 0) -> str:
    """What it prints; without a PYTHONPATH that may lead back to the repository."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the repository."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "trainmerge", place / "trainmerge", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    run(*build, "--disable-pip-version-check", "-w", "out", ".", cwd=place)
    (built,) = (place / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's folder of programs."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    install = ("install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=place)
    (site,) = place.glob("lib/python*/site-packages")  # pip must not see the package that is installed there:
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def test_the_wheel_has_every_file_and_the_mark_of_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "trainmerge").rglob("*.py")}
    assert files | {"trainmerge/py.typed", "trainmerge/__init__.pyi"} <= names
    assert not any(name.startswith(("tests", "data", "configs")) for name in names)


def test_the_command_fits_from_the_wheel_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    assert "trainmerge export runs/first merged/" in run(installed / "trainmerge", "--help", cwd=tmp_path)
    where = run(installed / "python", "-c", "import trainmerge; print(trainmerge.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where
    write_world(tmp_path)
    config = write_config(tmp_path, trainer__max_steps=1)
    run(installed / "trainmerge", "fit", "--config", config, "--run", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "coefficients.safetensors").exists()


def test_users_get_types(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(DEPENDENCIES)
    (tmp_path / "user.py").write_text(MISTYPED)
    check = (sys.executable, "-m", "mypy", "--python-executable", installed / "python")
    said = run(*check, "user.py", cwd=tmp_path, code=1).splitlines()
    assert 'Argument "weight" to "Expert" has incompatible type "str"; expected "float"' in said[0]
    assert said[1].startswith("Found 1 error in 1 file")


def test_every_requirement_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    for need in project["dependencies"] + extras:
        assert ">=" in need or need.startswith(("trainmerge[", "types-")), need
    assert all("==" in pin for pin in oldest())
