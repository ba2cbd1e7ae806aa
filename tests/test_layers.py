"""Which file may import what. A new file needs a line here, and one in CONTRIBUTING.md's map."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trainmerge"

# A file imports only from lower floors; inside a folder, files may import one another.
FLOORS = {
    "folders": 0,
    "processes": 0,
    "ahead": 0,
    "anchor": 1,
    "batch": 1,
    "config": 1,
    "constraints": 1,
    "frank_wolfe": 1,
    "examples": 1,
    "devices": 1,
    "gradients": 1,
    "kernels": 1,
    "memory": 1,
    "metrics": 1,
    "run_folder": 1,
    "storage": 1,
    "tables": 1,
    "trajectory": 1,
    "tokenizer": 2,
    "calibration": 3,
    "coefficients": 2,
    "economy": 2,
    "heads": 2,
    "objectives": 2,
    "task_vectors": 2,
    "layer_taps": 3,
    "checkpoints": 3,
    "forward": 3,
    "functional": 3,
    "held": 3,
    "together": 1,
    "sharded": 4,
    "merged_model": 4,
    "preprocess": 3,
    "initial": 3,
    "presets": 3,
    "streaming": 3,
    "recipe": 4,
    "quantise": 4,
    "rehearsal": 4,
    "plan": 5,
    "card": 5,
    "shards": 5,
    "resident": 5,
    "measure": 6,
    "teachers": 6,
    "export": 6,
    "verify": 7,
    "module": 7,
    "report": 7,
    "kinds": 3,
    "geometry": 4,
    "keeping": 8,
    "stopping": 8,
    "loggers": 8,
    "evaluate": 7,
    "callbacks": 8,
    "planning": 8,
    "provenance": 8,
    "safeguard": 8,
    "preflight": 8,
    "trainer": 9,
    "importance": 9,
    "reopen": 8,
    "allocation": 10,
    "inspection": 8,
    "scoring": 8,
    "budget": 9,
    "run": 10,
    "fit_cli": 11,
    "tradeoffs": 12,
    "tradeoff_cli": 13,
    "cli": 14,
    "__init__": 15,  # the public names
}
FOLDERS = {
    "checkpoints",
    "evaluate",
    "inspection",
    "kernels",
    "objectives",
    "preprocess",
    "report",
    "tradeoffs",
}

CALLBACKS = {"callbacks", "keeping", "loggers", "stopping"}

# Large dependencies stay in the rooms that are about them.
ONLY_IN = {
    "pytorch_lightning": {"module", "calibration", "run", "trainer", "fit_cli", "cli", *CALLBACKS},
    "matplotlib": {"report", "loggers"},
    "lightning": set(),  # the same under another name
    "transformers": {"checkpoints", "tokenizer"},
    "peft": {"checkpoints"},
}
NO_NAMES = {"utils", "util", "common", "helpers", "core", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The file's or folder's name directly below trainmerge/."""
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


def wrongs(room: str, source: str) -> list[str]:
    """What this source in this room imports and must not."""
    wrong = []
    for module in sorted(imports_of(source)):
        top, *below = module.split(".")
        if top == "trainmerge":
            target = below[0] if below and below[0] in FLOORS else "__init__"
            if not (target == room and room in FOLDERS) and FLOORS[target] >= FLOORS[room]:
                wrong.append(f"{room} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[target]})")
        elif room not in ONLY_IN.get(top, {room}):
            wrong.append(f"{room} imports {module}; only {sorted(ONLY_IN[top])} may")
    return wrong


def test_there_is_something_to_check():
    assert {room_of(path) for path in FILES} >= {"kernels", "merged_model", "objectives", "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    assert room in FLOORS, f"{path.name} is on no floor: give it one in tests/test_layers.py"
    assert path.parent == PACKAGE or room in FOLDERS
    assert path.stem not in NO_NAMES, f"{path.name}: say what is in it"
    assert not path.stem.startswith("base_")
    assert wrongs(room, path.read_text()) == []


def test_no_two_files_import_each_other():
    """Inside a folder too, where floors do not say it."""
    names = {module_of(path) for path in FILES}
    graph = {module_of(path): imports_of(path.read_text()) & names for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize(
    ("room", "source", "count"),
    [
        ("merged_model", "from trainmerge.coefficients import Coefficients", 0),
        ("coefficients", "from trainmerge.merged_model import MergedModel", 1),
        ("coefficients", "def f():\n    import trainmerge.merged_model", 1),  # deferred
        ("coefficients", "if TYPE_CHECKING:\n    from trainmerge import module, storage", 1),
        ("coefficients", "from trainmerge import Coefficients", 1),  # the public name, from the top
        ("coefficients", "from trainmerge.task_vectors import TaskVectors", 1),  # the same floor
        ("kernels", "from trainmerge.kernels.terms import Term", 0),
        ("checkpoints", "import peft.tuners, transformers\nimport torch", 0),
        ("kernels", "from transformers.utils import logging", 1),
        ("objectives", "import pytorch_lightning as pl, peft", 2),
        ("module", "import lightning.pytorch as pl", 1),
    ],
)
def test_the_rule_finds_what_it_forbids(room, source, count):
    assert len(wrongs(room, source)) == count
