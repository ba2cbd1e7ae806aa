"""A run folder: where every file of a run is, and whether a run may go on in it."""

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
| `manifest.json` | what the run depends on: checksums, data, settings, versions, command |
| `sources.json` | where each number of base and experts lies, and their files' times: an export reads it |
| `coefficients.safetensors` | the coefficients after the last saved step, with their layout in the header |
| `metrics.jsonl` | one line a logged step |
| `trajectory.bin` | the coefficients' path: at most about a megabyte, thinned as the run gets longer |
| `usage.jsonl` | seconds and memory, a line a process that ended by itself |
| `report/` | pictures, their numbers, and one page to look at: `index.html` |
| `pareto.json` | what one task costs another, once `trainmerge pareto` has run |
| `calibration_loss.json` | the loss over all calibration examples at start and end, with `keep_better` |
| `checkpoints/` | the optimizer's state after the last saved step; `--resume auto` goes on from it |
| `workspace/` | preprocessed task vectors and recorded experts; made again when deleted |

Go on: `trainmerge fit THIS_FOLDER/config.yaml`, from the folder that `manifest.json` names under
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
        """What the run was made from."""
        return self.path / "manifest.json"

    @property
    def sources(self) -> Path:
        """Where base and experts have their tensors."""
        return self.path / "sources.json"

    @property
    def coefficients(self) -> Path:
        """The learned coefficients."""
        return self.path / "coefficients.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def trajectory(self) -> Path:
        """The coefficients at some of the steps."""
        return self.path / "trajectory.bin"

    @property
    def usage(self) -> Path:
        """What the run took."""
        return self.path / "usage.jsonl"

    @property
    def report(self) -> Path:
        """Where the pictures are drawn."""
        return self.path / "report"

    @property
    def front(self) -> Path:
        """What `trainmerge pareto` found around the coefficients."""
        return self.path / "pareto.json"

    @property
    def checkpoints(self) -> Path:
        """Where snapshots lie."""
        return self.path / "checkpoints"

    @property
    def workspace(self) -> Path:
        """Preprocessed task vectors."""
        return self.path / "workspace"

    def examples(self) -> str:
        """What identifies the calibration examples that the run looked at."""
        made = self.read_manifest()
        return examples_identity(made["calibration"], made["data"])

    def read_manifest(self) -> dict[str, Any]:
        """What the run was made from.

        Raises:
            ValueError: the file is damaged, or of something else.
        """
        made = read_json(self.manifest, LOST)
        if absent := [key for key in NEEDED if key not in made]:
            raise ValueError(f"{self.manifest}: no manifest of a run: {', '.join(absent)} not in it. {LOST}")
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
        """Whether something was saved that must not be lost: until then a run may begin with other things."""
        return self.latest() is not None or self.coefficients.exists()

    def check_place(self) -> None:
        """Raise ValueError if the folder cannot be made or written."""
        place = self.path.absolute()
        while not place.exists() and not place.is_symlink():
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{place} is no folder, so {self.path} cannot hold a run: name another folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{place}: no permission to write there: name another folder")

    def resume_from(self, resume: str) -> Path | None:
        """The checkpoint that `resume` (auto, never, or a path) means; none for a new run.

        Raises:
            ValueError: `never` in a folder that holds a run, or a path that is not there.
        """
        if resume == "auto":
            return self.latest()
        if resume == "never":
            if self.began:
                raise ValueError(f"{self.path} holds a run already: use --resume auto, or another folder")
            return None
        if not Path(resume).is_file():
            raise ValueError(
                f"--resume {resume}: no such checkpoint (auto, never, or the path of a .ckpt file)"
            )
        return Path(resume)

    def check(self, description: Mapping[str, Any]) -> None:
        """Check that the run in the folder, if there is one, was made from the same things.

        Raises:
            ValueError: listing what differs.
        """
        if not self.began or not self.manifest.exists():
            return
        different = differences(self.read_manifest(), description)
        if different:
            raise ValueError(
                f"{self.path} holds a run made from other things:\n{different}\n"
                "Undo the change to resume it, or use another folder."
            )

    def create(self, description: Mapping[str, Any]) -> None:
        """Make the folder and its manifest, unless a run that began has them."""
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
        """Remove the snapshots of later steps: a run that went back to `step` will make others."""
        for later, snapshot in self.snapshots().items():
            if later > step:
                snapshot.unlink()


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A line for each entry of `now` that `made` has otherwise; empty if there is none.

    A class's public path and the path that it had in older files are the same.
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
