"""A run folder: the paths of a run's files, and whether a run may resume in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainmerge.data.examples import examples_identity
from trainmerge.run.manifest import differences, new_manifest, note_command, read_manifest
from trainmerge.system.access import check_folder_place
from trainmerge.system.atomic import write_whole

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
| `search.jsonl` | the merges that `trainmerge search` scored |
| `pareto.json` | the Pareto front of the tasks, once `trainmerge pareto` has run |
| `calibration_loss.json` | the loss over all calibration examples at start and end, with `keep_better` |
| `statistics.safetensors` | batch norms' statistics of the merge, with `recipe.buffers: reestimate` |
| `checkpoints/` | the optimizer's state after the last saved step; `--resume auto` continues from it |
| `workspace/` | preprocessed task vectors, recorded outputs, generated texts; recreated when deleted |

Resume: `trainmerge fit THIS_FOLDER/config.yaml`, from the folder that `manifest.json` names under
`started`: paths are relative to it. Export: `trainmerge export THIS_FOLDER OUT`.
With classes of your own modules, add `--trust MODULE` to each.
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
    def statistics(self) -> Path:
        """The re-estimated statistics of batch norms."""
        return self.path / "statistics.safetensors"

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
    def lock(self) -> Path:
        """The file that a fit, a search or a Pareto front locks; see `run.in_use`."""
        return self.path / ".lock"

    @property
    def search(self) -> Path:
        """The merges that `trainmerge search` scored, one per line after a header."""
        return self.path / "search.jsonl"

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
            FileNotFoundError: there is none.
            ValueError: the file is damaged, or not a manifest of a run.
        """
        return read_manifest(self.manifest)

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
        """Raise ValueError if the folder, or one within it that a fit writes to, cannot be written."""
        check_folder_place(self.path, "a run folder")
        for inside in (self.workspace, self.checkpoints):
            check_folder_place(inside, f"the folder {inside.name} of a run")

    def check(self, description: Mapping[str, Any], by_key: str = "") -> None:
        """Check that the run in the folder, if there is one, has the same experts, data and settings.

        `by_key` lists the configuration's changed keys, because some differences are of digests.

        Raises:
            ValueError: lists the differences.
        """
        if not self.began or not self.manifest.exists():
            return
        different = differences(self.read_manifest(), description)
        if different:
            keys = f"In the configuration:\n{by_key}\n" if by_key else ""
            raise ValueError(
                f"{self.path} holds a run with different experts, data or settings:\n{different}\n"
                f"{keys}Undo the change to resume it, or use another folder."
            )

    def create(self, description: Mapping[str, Any], hub: Mapping[str, Any] = {}) -> None:
        """Create the folder and its manifest, unless a run has started in it; `hub`: see `hub_origins`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.began and self.manifest.exists():
            note_command(self.manifest)
            return
        write_whole(self.path / "README.md", README)
        new_manifest(self.manifest, description, hub)

    def drop_snapshots_before(self, step: int) -> None:
        """Remove the snapshots before `step`, whose own snapshot is on disk."""
        for earlier, snapshot in self.snapshots().items():
            if earlier < step:
                snapshot.unlink()

    def drop_snapshots_after(self, step: int) -> None:
        """Remove the snapshots after `step`, because a run rewound to it writes new ones."""
        for later, snapshot in self.snapshots().items():
            if later > step:
                snapshot.unlink()
