"""Every example of README and the documentation runs: its YAML in a fit of two steps at most, its Python too.

The files that an example names are made where it names them, from the models and texts of `tests.world`.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.heads_world import texts, write_heads, write_rows
from tests.hub_stand_in import use, write_cache
from tests.mixture_world import write_mixture
from tests.picture_world import TASKS as PICTURES
from tests.picture_world import clip, write_picture_world
from tests.world import LABELS, write_languages, write_world
from trainmerge.cli import main
from trainmerge.fitting.allocate_chunks import allocate_run
from trainmerge.run.templates import expand
from trainmerge.system.hub import parse_id

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks/docs").rglob("*.md"))]
FENCE = re.compile(r"(?P<note><!-- not run: .*? -->\n\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.M | re.S)
EXPERTS = {  # of examples that name some without defining them
    "layer-swap": ("language", "maths"),
    "metrics-weighted": ("early", "late"),
    "rcp": ("reasoner", "domain"),
    "t3": ("domain",),
}
TASKS = tuple(LABELS)


@dataclass(frozen=True)
class Example:
    """A fenced block of a page."""

    page: Path
    kind: str
    code: str


def examples() -> Iterator[Example]:
    for page in PAGES:
        for found in FENCE.finditer(page.read_text()):
            if not found["note"]:
                yield Example(page, found["kind"], found["code"])


def of_kind(kind: str) -> list[Any]:
    """The examples of one language, each with a readable id."""
    chosen = [example for example in examples() if example.kind == kind]
    return [pytest.param(e, id=f"{e.page.stem}-{i}") for i, e in enumerate(chosen)]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders with heads, language models, mixtures, classifiers with own heads, and CLIPs with pictures."""
    kinds = ("encoders", "languages", "mixtures", "own heads", "pictures")
    made = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in kinds}
    write_world(made["encoders"])
    write_languages(made["languages"])
    write_mixture(made["mixtures"])
    own, classes = made["own heads"], {"task": "ForSequenceClassification"}
    write_heads(own, "Roberta", {"a": {**classes, "num_labels": 2}, "b": {**classes, "num_labels": 3}})
    write_rows(own / "test.jsonl", [{"text": text, "label": 1} for text in texts(9, 6)])
    write_picture_world(made["pictures"], clip)
    for task in PICTURES:
        shutil.copy(made["encoders"] / "mood" / "labels.json", made["pictures"] / task)
    return made


def link(place: str, target: Path) -> None:
    """Put a file or folder where an example has it."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    if not Path(place).exists():
        Path(place).symlink_to(target)


def cache(model: str, target: Path) -> None:
    """Put a model into the hub's cache of an example, where its id has it."""
    found = parse_id(model)
    assert found is not None
    shutil.copytree(target, Path("made", found.repository, found.subfolder))
    write_cache(Path("cache"), found.repository, Path("made", found.repository), ref=found.revision or "main")


def files_of(worlds: dict[str, Path], world: str, number: int) -> dict[str, Path]:
    """The number-th expert's files, by their key in a recipe."""
    if world == "pictures":
        root, task = worlds["pictures"], PICTURES[number]
        folders = {name: root / task / name for name in ("calibration", "test")}
        return {"path": root / "experts" / task, "labels": root / task / "labels.json", **folders}
    if world == "encoders":
        root, task = worlds["encoders"], TASKS[number]
        texts = {name: root / task / f"{name}.jsonl" for name in ("calibration", "test")}
        return {"path": root / "experts" / task, "labels": root / task / "labels.json", **texts}
    root, name = worlds[world], "ab"[number]
    return {"path": root / name, "calibration": root / f"{name}.jsonl", "test": root / f"{name}-test.jsonl"}


def own_files(worlds: dict[str, Path], number: int) -> dict[str, Path]:
    """The same of an expert with a head of its own."""
    root, name = worlds["own heads"], ("a", "b")[number]
    return {"path": root / name, "calibration": root / f"{name}.jsonl", "test": root / "test.jsonl"}


def default_expert(name: str, encoders: bool) -> dict[str, Any]:
    head = {"class_path": "trainmerge.LabelHead", "init_args": {"labels": f"{name}/labels.json"}}
    texts = {key: f"{name}/{key}.jsonl" for key in ("calibration", "test")}
    return {"path": f"experts/{name}", **texts, **({"head": head} if encoders else {})}


def completed(example: Example, worlds: dict[str, Path]) -> dict[str, Any]:
    """The example's configuration with what it leaves out, and its files in place."""
    content: dict[str, Any] = yaml.safe_load(example.code)
    encoders, own = "LabelHead" in example.code or "diversity" in example.code, "head: own" in example.code
    world = "own heads" if own else "encoders" if encoders else "languages"
    if "text: null" in example.code:
        world = "pictures"
    if "CalibratedRouters" in example.code or "mixture: expert" in example.code:
        world = "mixtures"
    recipe = content.setdefault("recipe", {})
    put = cache if example.page.stem == "hub" else link
    put(recipe.setdefault("base", "base"), worlds[world] / "base")
    names = EXPERTS.get(example.page.stem, ("movie", "r8"))
    recipe.setdefault("experts", {name: default_expert(name, encoders) for name in names})
    experts = expand(content)["recipe"]["experts"]
    for number, task in enumerate([*experts.values(), *recipe.get("held_out", {}).values()]):
        files = own_files(worlds, number) if own else files_of(worlds, world, number)
        for key in {"path", "calibration", "test"} & set(task):
            if isinstance(task[key], str):
                (put if key == "path" else link)(task[key], files[key])
        if "head" in task and not own:
            link(task["head"]["init_args"]["labels"], files["labels"])
    initial = content.get("model", {}).get("initial")
    arguments = initial.get("init_args", {}) if isinstance(initial, dict) else {}
    if "texts" in arguments:
        link(arguments["texts"], files_of(worlds, world, 0)["calibration"])
    if "outer" in arguments:
        arguments.update(bottom=1, top=0, transition=0)  # these models have two blocks
    trainer = content.setdefault("trainer", {})
    trainer.update(accelerator="cpu", max_steps=min(trainer.get("max_steps", 1), 2))
    content["data"] = {**content.get("data", {}), "batch_size": 2, "max_examples": 4}
    return content


def first_stage(content: dict[str, Any]) -> None:
    """The run that Expert Merging++ begins with, and its chunks."""
    first = {key: content[key] for key in ("data", "trainer")}
    Path("first.yaml").write_text(
        yaml.safe_dump({**first, "recipe": {key: content["recipe"][key] for key in ("base", "experts")}})
    )
    assert main(["fit", "first.yaml", "runs/first", "--no-report"]) == 0
    allocate_run("runs/first", "chunks.json", 1.0, 1.0, "magnitude")


@pytest.mark.parametrize("example", of_kind("yaml"))
def test_yaml_is_a_configuration_that_fits(
    example: Example, worlds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, tmp_path / "cache")
    content = completed(example, worlds)
    if "chunks.json" in example.code:
        first_stage(content)
    Path("example.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["fit", "example.yaml", "runs/example", "--no-report"]) == 0
    assert Path("runs/example/coefficients.safetensors").is_file()


@pytest.mark.parametrize("example", of_kind("python"))
def test_python_runs(
    example: Example, worlds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link("data/cache/models/minilm-l6", worlds["encoders"] / "base")
    for number, name in enumerate(("movie", "r8")):
        files = files_of(worlds, "encoders", number)
        link(f"data/experts/{name}", files["path"])
        link(f"data/cache/text/{name}/calibration.jsonl", files["calibration"])
        link(f"data/cache/text/{name}/labels.json", files["labels"])
    if "tm.export_run" not in example.code:
        shutil.copytree(worlds["encoders"] / "base", "merged")
    exec(example.code.replace("max_steps=80", "max_steps=1"), {})


@pytest.mark.parametrize("example", of_kind("sh"))
def test_commands_are_ours_and_their_configurations_are_there(example: Example) -> None:
    for command in re.findall(r"(?:^|[ ./])trainmerge(?:\.cli)? ([a-z]+)", example.code):
        assert command in {
            "auto",
            "fit",
            "allocate",
            "export",
            "extract",
            "merge",
            "evaluate",
            "compare",
            "inspect",
            "report",
            "plan",
            "pareto",
            "search",
            "push",
            "rebuild",
            "unpack",
            "shrink",
        }
    for file in re.findall(r"configs/\S+", example.code):
        assert (ROOT / file).is_file()
