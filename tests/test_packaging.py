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
from email import message_from_string
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cli.test_cli import write_config
from tests.lock import LOCK, needed
from tests.lower_bounds import oldest
from tests.world import write_world
from trainmerge.cli import main

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


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        (licence,) = [name for name in opened.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert opened.read(licence) == (ROOT / "LICENSE").read_bytes()
        said = message_from_string(opened.read(name).decode())
    assert said["Name"] == "trainmerge"
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said["Author"] == "The trainmerge authors"
    assert said["Author-email"] is None, "no personal data"
    assert {"model merging", "LoRA"} <= set(said["Keywords"].split(","))
    classifiers = said.get_all("Classifier")
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(classifiers)
    assert not any(one.startswith("License ::") for one in classifiers), "License-Expression replaces it"
    assert "# trainmerge" in said.get_payload()


def test_the_command_names_the_versions_that_a_report_of_a_fault_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--version"]) == 0
    expected = f"trainmerge {version('trainmerge')}, torch {version('torch')}, Python {python_version()}\n"
    assert capsys.readouterr().out == expected


def test_the_lock_is_within_the_bounds() -> None:
    pins = [Requirement(line) for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    locked = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        need = Requirement(text)
        assert locked[canonicalize_name(need.name)] in need.specifier, text
    assert {canonicalize_name(name) for name in ("huggingface-hub", "torch")} <= needed().keys()
    assert f"torch=={locked['torch']}" in (ROOT / "constraints.txt").read_text()


def test_the_container_gets_the_files_that_it_names() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in let_in
    assert "USER merge" in lines
    assert 'ENTRYPOINT ["trainmerge"]' in lines


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
