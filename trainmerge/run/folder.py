"""A run folder: the paths of a run's files, and whether a run may resume in it."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainmerge.data.examples import examples_identity
from trainmerge.run.config import public_paths
from trainmerge.system.atomic import write_whole
from trainmerge.system.json_file import read_json

PACKAGES = ("trainmerge", "torch", "pytorch-lightning", "transformers", "peft", "datasets", "safetensors")

NEEDED = ("experts", "checksums", "recipe", "calibration", "data")  # of a manifest
LOST = "Restore it from a copy, or fit again in another folder."

README = """# A trainmerge run

| file | what it is |
|---|---|
| `recipe.yaml` | what is merged: base, experts, preprocessing, grouping |
| `config.yaml` | the whole resolved configuration, where the run was started from the command line |
| `manifest.json` | everything the run depends on: checksums, data, settings, versions, command |
| `sources.json` | the place of every tensor of base and experts, and their files' times; used by exports |
| `coefficients.safetensors` | the coefficients after the last saved step, with their layout in the header |
| `metrics.jsonl` | one line per logged step |
| `trajectory.bin` | the coefficients over the steps, thinned to about a megabyte at most |
| `usage.jsonl` | seconds and memory, one line per process that was not killed |
| `report/` | figures, their data, and the page `index.html` |
| `pareto.json` | the Pareto front of the tasks, once `trainmerge pareto` has run |
| `calibration_loss.json` | the loss over all calibration examples at start and end, with `keep_better` |
| `checkpoints/` | the optimizer's state after the last saved step; `--resume auto` continues from it |
| `workspace/` | preprocessed task vectors and recorded expert outputs; recreated when deleted |

Resume: `trainmerge fit THIS_FOLDER/config.yaml`, from the folder that `manifest.json` names under
`started`: paths are relative to it. Export: `trainmerge export THIS_FOLDER OUT`.
"""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name."""

    path: Path

    @property
    def recipe(self) -> Path:
        """What is merged."""
        return self.path / "recipe.yaml"

    @property
    def config(self) -> Path:
        """The resolved command-line configuration."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Everything the run depends on."""
        return self.path / "manifest.json"

    @property
    def sources(self) -> Path:
        """The places of the tensors of base and experts."""
        return self.path / "sources.json"

    @property
    def coefficients(self) -> Path:
        """The learned coefficients."""
        return self.path / "coefficients.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def trajectory(self) -> Path:
        """The coefficients at some of the steps."""
        return self.path / "trajectory.bin"

    @property
    def usage(self) -> Path:
        """Time and memory of the run."""
        return self.path / "usage.jsonl"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.path / "report"

    @property
    def front(self) -> Path:
        """The Pareto front of `trainmerge pareto`."""
        return self.path / "pareto.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of snapshots."""
        return self.path / "checkpoints"

    @property
    def workspace(self) -> Path:
        """Preprocessed task vectors."""
        return self.path / "workspace"

    def examples(self) -> str:
        """The identity of the run's calibration examples."""
        made = self.read_manifest()
        return examples_identity(made["calibration"], made["data"])

    def read_manifest(self) -> dict[str, Any]:
        """The manifest: everything the run depends on.

        Raises:
            ValueError: the file is damaged, or not a manifest of a run.
        """
        made = read_json(self.manifest, LOST)
        if absent := [key for key in NEEDED if key not in made]:
            raise ValueError(
                f"{self.manifest}: not a manifest of a run: it lacks {', '.join(absent)}. {LOST}"
            )
        return made

    def snapshots(self) -> dict[int, Path]:
        """Step -> its snapshot."""
        return {int(path.stem[5:]): path for path in self.checkpoints.glob("step-*.ckpt")}

    def latest(self) -> Path | None:
        """The snapshot with the highest step."""
        snapshots = self.snapshots()
        return snapshots[max(snapshots)] if snapshots else None

    @property
    def began(self) -> bool:
        """Whether progress was saved; until then a run may start with different experts, data or settings."""
        return self.latest() is not None or self.coefficients.exists()

    def check_place(self) -> None:
        """Raise ValueError if the folder cannot be made or written."""
        place = self.path.absolute()
        while not place.exists() and not place.is_symlink():
            place = place.parent
        if not place.is_dir():
            raise ValueError(
                f"{place} is not a folder, so {self.path} cannot be a run folder: choose another one"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{place}: no permission to write there: choose another folder")

    def resume_from(self, resume: str) -> Path | None:
        """The checkpoint for `resume` (auto, never, or a path); None for a new run.

        Raises:
            ValueError: `never` in a folder that has a run, or a path that does not exist.
        """
        if resume == "auto":
            return self.latest()
        if resume == "never":
            if self.began:
                raise ValueError(f"{self.path} already has a run: use --resume auto, or another folder")
            return None
        if not Path(resume).is_file():
            raise ValueError(
                f"--resume {resume}: no such checkpoint (auto, never, or the path of a .ckpt file)"
            )
        return Path(resume)

    def check(self, description: Mapping[str, Any]) -> None:
        """Check that the run in the folder, if there is one, has the same experts, data and settings.

        Raises:
            ValueError: lists the differences.
        """
        if not self.began or not self.manifest.exists():
            return
        different = differences(self.read_manifest(), description)
        if different:
            raise ValueError(
                f"{self.path} holds a run with different experts, data or settings:\n{different}\n"
                "Undo the change to resume it, or use another folder."
            )

    def create(self, description: Mapping[str, Any]) -> None:
        """Create the folder and its manifest, unless a run has started in it."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.began and self.manifest.exists():
            return
        (self.path / "README.md").write_text(README)
        started = {
            "command": shlex.join(sys.argv),
            "folder": str(Path.cwd()),
            "threads": torch.get_num_threads(),  # of each process: sums depend on them
        }
        manifest = {**description, "versions": versions(), "started": started}
        write_whole(self.manifest, json.dumps(manifest, indent=2))

    def drop_snapshots_after(self, step: int) -> None:
        """Remove the snapshots after `step`, because a run rewound to it writes new ones."""
        for later, snapshot in self.snapshots().items():
            if later > step:
                snapshot.unlink()


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line for each entry of `now` that differs from `made`; empty if there is none.

    A class's public path and its path in older files count as equal.
    """
    before, plain = public_paths(made), public_paths(json.loads(json.dumps(now)))
    return "\n".join(
        f"  {key}: {_short(before.get(key))} then, {_short(value)} now"
        for key, value in plain.items()
        if before.get(key) != value
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
