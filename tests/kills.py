"""SIGKILL at random moments of every command, KILLS times (200 by default): `make soak`.

`ONLY=extract,auto KILLS=20` kills each of these commands so often, and keeps the other counts and seeds.
Each command is killed again and again and then left alone. What it leaves has to be, byte for byte, what a
command leaves that nobody killed: coefficients, every line of the logs, exports, scores, and no further file.
Between a kill and the next start, coefficients and snapshots have to be whole, if they are there at all.
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml
from tqdm import tqdm

import trainmerge.auto
import trainmerge.cli.fit
import trainmerge.evaluate.console
import trainmerge.export.export_adapter
import trainmerge.export.extract
import trainmerge.export.rebuild
import trainmerge.export.verify
import trainmerge.fitting.allocate_chunks
import trainmerge.merging.merge_file
import trainmerge.merging.one_line
import trainmerge.mixtures.shrink
import trainmerge.packed.unpack
import trainmerge.report.write
import trainmerge.tradeoffs.pareto
import trainmerge.tradeoffs.search  # noqa: F401 - a forked command finds all of these imported
from tests.mixture_world import write_mixture
from tests.results import FOLDER
from tests.threads import limit_threads
from tests.world import LABELS, recipe, write_world
from trainmerge.cli import main
from trainmerge.fitting.provenance import load_snapshot
from trainmerge.run.config import to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.manifest import versions
from trainmerge.run.open_run import read_run
from trainmerge.system.atomic import write_whole
from trainmerge.system.safetensors_file import sha256

FORK = multiprocessing.get_context("fork")  # a command costs no imports; torch has one thread, so it may fork
HITS = 7  # kills of one command before it is left alone, at most
HANG = 1800  # seconds: only a hang takes so long, however busy the machine
VARYING = {"usage.jsonl", "manifest.json", "trainmerge_manifest.json", "index.html"}  # times and commands
TIMED = {"trials.jsonl", "auto.json"}  # hold seconds beside their results
SECONDS = re.compile(rb'"seconds": [^,}\s]+')
OTHER_BITS = (".png", ".ckpt")  # a snapshot counts what its process did


@dataclass(frozen=True)
class Command:
    """A command in a folder `place`, which has a finished run `run` if it `reads` one."""

    words: Callable[[Path], list[str]]
    reads: bool = True


MASKS = ["--codec", "mask", "--overwrite"]
CUT = ["--rank", "2", "--rest", "leave", "--overwrite"]
COMMANDS = {
    "fit": Command(lambda place: ["fit", str(place / "../fit.yaml"), str(place / "run")], reads=False),
    "search": Command(
        lambda place: [
            "search", str(place / "../fit.yaml"), str(place / "run"), "--score", "loss", "--evaluations", "6"
        ],
        reads=False,
    ),
    "pareto": Command(lambda place: ["pareto", str(place / "run"), "--points", "10", "--checks", "2",
                                       "--examples", "4"]),
    "export": Command(lambda place: ["export", str(place / "run"), str(place / "merged"), "--overwrite"]),
    "evaluate": Command(lambda place: ["evaluate", str(place / "run"), "--limit", "8"]),
    "allocate": Command(lambda place: ["allocate", str(place / "run"), str(place / "chunks.json")]),
    "report": Command(lambda place: ["report", str(place / "run")]),
    "export --as adapter": Command(
        lambda place: ["export", str(place / "run"), str(place / "adapter"), "--as", "adapter", *CUT]
    ),
    "extract": Command(
        lambda place: [
            "extract", str(place / "../base"), str(place / "../experts/mood"), str(place / "lora"), *CUT
        ],
        reads=False,
    ),
    "export --as packed": Command(
        lambda place: ["export", str(place / "run"), str(place / "packed"), "--as", "packed", *MASKS]
    ),
    "unpack": Command(
        lambda place: ["unpack", str(place / "../packed"), "mood", str(place / "mood"), "--overwrite"],
        reads=False,
    ),
    "rebuild": Command(
        lambda place: ["rebuild", str(place / "../merged/README.md"), str(place / "again"), "--overwrite"],
        reads=False,
    ),
    "compare": Command(
        lambda place: [
            "compare", str(place / "run"), str(place / "../base"), "--limit", "8",
            "--output", str(place / "compared.json"),
        ]
    ),
    "shrink": Command(
        lambda place: [
            "shrink", str(place / "../mixture/base"), str(place / "smaller"), "--experts", "4",
            "--calibration", str(place / "../mixture/a.jsonl"), "--overwrite",
        ],
        reads=False,
    ),
    "auto": Command(lambda place: ["auto", str(place / "../auto.yaml"), str(place / "merged")], reads=False),
    "merge CONFIG": Command(
        lambda place: ["merge", str(place / "../fit.yaml"), str(place / "merged")], reads=False
    ),
    "merge mergekit.yml": Command(
        lambda place: ["merge", str(place / "../mergekit.yml"), str(place / "merged")], reads=False
    ),
    "merge BASE EXPERT": Command(
        lambda place: [
            "merge", str(place / "../base"), str(place / "../experts/mood"), str(place / "../experts/animal"),
            "--method", "ties", "--density", "0.5", "-o", str(place / "merged"),
        ],
        reads=False,
    ),
}  # fmt: skip


# What commands that read no run need: made of the finished run, before the first kill
READ = {
    "packed": ["--as", "packed", "--codec", "mask"],
    "merged": [],
}


def write_configuration(root: Path) -> None:
    """A fit with recorded teachers, a preprocessor's file and snapshots every five steps."""
    content = {
        "recipe": to_config(recipe(root)) | {"preprocess": [{"class_path": "trainmerge.Ties"}]},
        "model": {
            "objective": {"class_path": "trainmerge.Entropy", "init_args": {"agreement": 1.0}},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
        },
        "data": {"batch_size": 4, "max_length": 16},
        "trainer": {"max_steps": 20, "accelerator": "cpu"},
        "save_every": 5,
        "report": False,
    }
    (root / "fit.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    short = {**content, "trainer": {"max_steps": 6, "accelerator": "cpu"}, "save_every": 3}
    (root / "auto.yaml").write_text(yaml.safe_dump(short, sort_keys=False))
    models = [{"model": str(root / "experts" / name), "parameters": {"weight": 0.5}} for name in LABELS]
    of_mergekit = {"merge_method": "task_arithmetic", "base_model": str(root / "base"), "models": models}
    (root / "mergekit.yml").write_text(yaml.safe_dump(of_mergekit))


def call(words: list[str], log: Path) -> None:
    """One command, in a forked process, with a lock of progress bars that no killed one can have kept."""
    tqdm.set_lock(threading.RLock())
    os.chdir(log.parent / "experts")  # where `rebuild` finds all of a card's models
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(words))


def contents(place: Path) -> dict[str, str]:
    """File -> SHA-256, without seconds; only the name of folders, and where it differs from call to call."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    fixed = {path: path.name not in VARYING and path.suffix not in OTHER_BITS for path in files}
    digests = {path: without_seconds(path) if path.name in TIMED else sha256(path) for path in files}
    found = {str(path.relative_to(place)): digests[path] if fixed[path] else "" for path in files}
    return found | {f"{path.relative_to(place)}/": "" for path in place.rglob("*") if path.is_dir()}


def without_seconds(path: Path) -> str:
    """The SHA-256 of a JSON file without its times."""
    return hashlib.sha256(SECONDS.sub(b"", path.read_bytes())).hexdigest()


class Kills:
    """Commands that are killed, and what happened to them."""

    def __init__(self, root: Path, seed: int, names: Collection[str] = tuple(COMMANDS)) -> None:
        self.root, self.dice = root, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.usual: dict[str, float] = {}
        self.wanted: dict[str, dict[str, str]] = {}
        for name in filter(names.__contains__, COMMANDS):  # `fit` first, whose run others read
            place = self._prepared(name)
            began = time.monotonic()
            self._finish(name, place)
            self.usual[name], self.wanted[name] = time.monotonic() - began, contents(place)
            if name == "fit":
                place.rename(root / "finished")
                self._export()
            print(name, f"{self.usual[name]:.2f} s", flush=True)

    def kill(self, name: str) -> None:
        """Kill one command a few times, leave it alone once, and compare."""
        place = self._prepared(name)
        for _ in range(self.dice.randrange(1, HITS + 1)):
            process = self._start(name, place)
            process.join(self.dice.uniform(0, self.usual[name]))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -9, (place / "../log.txt").read_text()[-2000:]
            self.seen[name] += 1
            for run_folder in ("run", "merged-run"):
                self._check(RunFolder(place / run_folder))
        self._finish(name, place)
        found = contents(place)
        different = {
            key for key in found.keys() | self.wanted[name] if found.get(key) != self.wanted[name].get(key)
        }
        assert {Path(key).name for key in different} <= {"usage.jsonl"}, (
            f"{name} in {place}: {sorted(different)}"
        )
        shutil.rmtree(place)

    def _export(self) -> None:
        for name, options in READ.items():
            words = ["export", str(self.root / "finished/run"), str(self.root / name), *options]
            process = FORK.Process(target=call, args=(words, self.root / "log.txt"))
            process.start()
            process.join(HANG)
            assert process.exitcode == 0, (self.root / "log.txt").read_text()[-3000:]

    def _prepared(self, name: str) -> Path:
        place = self.root / f"{name}-place"
        shutil.rmtree(place, ignore_errors=True)
        if COMMANDS[name].reads:
            shutil.copytree(self.root / "finished", place)
        else:
            place.mkdir()
        return place

    def _start(self, name: str, place: Path) -> BaseProcess:
        process = FORK.Process(target=call, args=(COMMANDS[name].words(place), self.root / "log.txt"))
        process.start()
        return process

    def _finish(self, name: str, place: Path) -> None:
        process = self._start(name, place)
        process.join(HANG)
        process.kill()
        assert process.exitcode == 0, (self.root / "log.txt").read_text()[-3000:]

    @staticmethod
    def _check(folder: RunFolder) -> None:
        """Whatever is there is whole."""
        for snapshot in folder.snapshots().values():
            load_snapshot(snapshot)
        if folder.coefficients.exists():
            read_run(folder)


def run(kills: int, seed: int, only: Collection[str] = ()) -> dict[str, int]:
    """Kill so many times, or each of some commands so many times; command -> its kills."""
    limit_threads()
    tqdm.set_lock(threading.RLock())  # by default one that all processes share
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_world(root)
        write_mixture(root / "mixture", num_experts=6)
        write_configuration(root)
        (root / "experts/base").symlink_to(root / "base")
        found = Kills(root, seed, {"fit", *only} if only else tuple(COMMANDS))
        while less := [name for name in only if found.seen[name] < kills]:
            found.kill(less[0])
            print(found.seen.total(), dict(found.seen), flush=True)
        while not only and found.seen.total() < kills:
            found.kill(found.dice.choices(list(found.usual), [s**-0.5 for s in found.usual.values()])[0])
            print(found.seen.total(), dict(found.seen), flush=True)
        return dict(sorted(found.seen.items()))


if __name__ == "__main__":
    count, number = int(os.environ.get("KILLS", "200")), int(os.environ.get("SOAK_SEED", "0"))
    chosen = [name for name in COMMANDS if name in os.environ.get("ONLY", "").split(",")]
    file = FOLDER / "kills.json"
    kept = json.loads(file.read_text()) if chosen else {"kills": {}, "seeds": []}
    seen = dict(sorted({**kept["kills"], **run(count, number, chosen)}.items()))
    report = {"kills": seen, "seeds": sorted({*kept["seeds"], number}), "versions": versions(), "lost": 0}
    write_whole(file, json.dumps(report, indent=1) + "\n")
