"""Which wing may import what: CONTRIBUTING.md's map, read and checked; and one name for one thing."""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trainmerge"


class Wing(NamedTuple):
    floor: int
    imports: frozenset[str]


def read_map(text: str) -> dict[str, Wing]:
    """The table of wings: | floor | `wing` | holds | may import |."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| [^|]+ \|([^|]*)\|$", text, flags=re.MULTILINE)
    return {name: Wing(int(floor), frozenset(re.findall(r"\w+", may))) for floor, name, may in rows}


WINGS = read_map((ROOT / "CONTRIBUTING.md").read_text())

# Large dependencies stay in the wings that are about them.
ONLY_IN = {
    "pytorch_lightning": {"fitting", "cli", "data"},
    "matplotlib": {"report", "fitting"},
    "lightning": set(),  # the same under another name
    "transformers": {"checkpoints", "data", "model"},
    "peft": {"checkpoints"},
}
NO_NAMES = {"utils", "util", "common", "helpers", "core", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def wing_of(path: Path) -> str:
    """The folder's name directly below trainmerge/; `__init__` for the file of public names."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """trainmerge/kernels/eager.py -> trainmerge.kernels.eager; a folder's own name for its __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(source: str) -> set[str]:
    """Every module that the source imports, wherever in it; `from trainmerge import x` is trainmerge.x."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports out, from trainmerge..."
            assert node.module
            if node.module == "trainmerge":
                found |= {f"trainmerge.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def wrongs(wing: str, source: str) -> list[str]:
    """What this source in this wing imports and must not."""
    wrong = []
    for module in sorted(imports_of(source)):
        top, *below = module.split(".")
        if top == "trainmerge":
            target = below[0] if below else "the public names"
            if wing != "__init__" and target not in WINGS[wing].imports | {wing}:
                wrong.append(f"{wing} imports {module}; it may import {sorted(WINGS[wing].imports)}")
        elif wing not in ONLY_IN.get(top, {wing}):
            wrong.append(f"{wing} imports {module}; only {sorted(ONLY_IN[top])} may")
    return wrong


def test_the_map_names_the_folders_that_there_are():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == WINGS.keys()
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_the_map_has_nine_floors_and_every_arrow_goes_down():
    assert {wing.floor for wing in WINGS.values()} == set(range(1, 10))
    for wing in WINGS.values():
        assert all(WINGS[below].floor < wing.floor for below in wing.imports)


@pytest.mark.parametrize("wing", WINGS)
def test_the_map_names_no_import_that_is_not_there(wing):
    sources = [path.read_text() for path in FILES if wing_of(path) == wing]
    found = {module.split(".")[1] for source in sources for module in imports_of(source) if "." in module
             and module.startswith("trainmerge.")}  # fmt: skip
    assert found - {wing} == WINGS[wing].imports


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    assert path.stem not in NO_NAMES, f"{path.name}: say what is in it"
    assert not path.stem.startswith("base_")
    assert wrongs(wing_of(path), path.read_text()) == []


def test_no_two_files_import_each_other():
    """Inside a wing too, where floors do not say it."""
    names = {module_of(path) for path in FILES}
    graph = {module_of(path): imports_of(path.read_text()) & names for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def homes_of(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Each public function's or class's name -> the modules that define it at their top."""
    homes: dict[str, list[str]] = {}
    for module, source in sources.items():
        for node in ast.parse(source).body:
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and node.name[0] != "_"
            ):
                homes.setdefault(node.name, []).append(module)
    return homes


def public_names(stub: str) -> frozenset[str]:
    """What the file of public names offers at the top of the package."""
    return frozenset(
        alias.asname or alias.name
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    )


PUBLIC = public_names((PACKAGE / "__init__.pyi").read_text())


def shared_names(sources: Mapping[str, str], public: frozenset[str] = PUBLIC) -> dict[str, list[str]]:
    """Names that several modules define.

    The command of a public function bears its name, and the kernels' implementations of one interface
    bear the interface's.
    """
    shared = {}
    for name, modules in homes_of(sources).items():
        own = [module for module in modules if name not in public or not module.startswith("trainmerge.cli.")]
        if len(own) > 1 and not all(module.startswith("trainmerge.kernels.") for module in own):
            shared[name] = own
    return shared


def test_no_two_things_have_one_name():
    assert shared_names({module_of(path): path.read_text() for path in FILES}) == {}


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (("trainmerge.data.a", "def f(): ..."), ("trainmerge.export.b", "class f: ..."), ["f"]),
        (("trainmerge.data.a", "def f(): ..."), ("trainmerge.data.b", "def f(): ..."), ["f"]),
        (("trainmerge.data.a", "def _f(): ..."), ("trainmerge.data.b", "def _f(): ..."), []),
        (("trainmerge.data.a", "def f(): ..."), ("trainmerge.data.b", "class C:\n    def f(self): ..."), []),
        (("trainmerge.kernels.a", "def f(): ..."), ("trainmerge.kernels.b", "def f(): ..."), []),
        (("trainmerge.kernels.a", "def f(): ..."), ("trainmerge.data.b", "def f(): ..."), ["f"]),
        (("trainmerge.cli.a", "def f(): ..."), ("trainmerge.data.b", "def f(): ..."), ["f"]),
        (("trainmerge.cli.a", "def public(): ..."), ("trainmerge.data.b", "def public(): ..."), []),
        (
            ("trainmerge.export.a", "def public(): ..."),
            ("trainmerge.data.b", "def public(): ..."),
            ["public"],
        ),
    ],
)
def test_the_rule_of_names_finds_what_it_forbids(first, second, shared):
    assert list(shared_names(dict([first, second]), public=frozenset({"public"}))) == shared


@pytest.mark.parametrize(
    ("wing", "source", "count"),
    [
        ("model", "from trainmerge.coefficients.layout import Layout", 0),
        ("coefficients", "from trainmerge.model.merged_model import MergedModel", 1),
        ("coefficients", "def f():\n    import trainmerge.model.merged_model", 1),  # deferred
        ("coefficients", "if TYPE_CHECKING:\n    from trainmerge import fitting, system", 1),
        ("coefficients", "from trainmerge import Coefficients", 1),  # the public name, from the top
        ("coefficients", "from trainmerge.preprocess.ties import Ties", 1),  # the same floor
        ("fitting", "from trainmerge.evaluate.runs import evaluate_run", 1),  # lower, and not for it
        ("kernels", "from trainmerge.kernels.terms import Term", 0),
        ("checkpoints", "import peft.tuners, transformers\nimport torch", 0),
        ("kernels", "from transformers.utils import logging", 1),
        ("objectives", "import pytorch_lightning as pl, peft", 2),
        ("fitting", "import lightning.pytorch as pl", 1),
    ],
)
def test_the_rule_finds_what_it_forbids(wing, source, count):
    assert len(wrongs(wing, source)) == count


def test_an_export_loads_no_library_that_it_does_not_use():
    """Each takes half a second and more; so they are imported where they are used."""
    large = [
        "datasets",
        "pandas",
        "pyarrow",
        "transformers",
        "pytorch_lightning",
        "torch.distributed.checkpoint",
    ]
    code = f"import sys, trainmerge.export; print([name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
