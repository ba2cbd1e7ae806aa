"""A run folder of `fit_module`: its description, metrics and snapshots, from which a killed fit goes on.

The user's own loaders are drawn again up to the snapshot's step, and must give the same batches.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.fitting.begin import Snapshot, find_snapshot
from trainmerge.fitting.contents import content_sha256
from trainmerge.fitting.metrics_log import JsonLines
from trainmerge.fitting.module_steps import ModuleSteps
from trainmerge.fitting.rewind import rewind
from trainmerge.model.plain_models import PlainModels
from trainmerge.run.config import to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use
from trainmerge.run.manifest import differences
from trainmerge.run.saved import new_snapshot
from trainmerge.run.trajectory import append
from trainmerge.system.atomic import sync, write_whole
from trainmerge.system.json_file import read_json_lines

LOSS = "losses/"  # before an expert's name, in metrics.jsonl
README = """# A run of trainmerge.fit_module

| file | what it is |
|---|---|
| `manifest.json` | settings, and checksums of base and experts |
| `coefficients.safetensors` | the coefficients after the last saved step |
| `metrics.jsonl`, `trajectory.bin` | the losses of every step; coefficients of earlier ones |
| `checkpoints/` | what the run resumes from |

The same call of `fit_module` resumes the run. `trainmerge report` reads it. Base and experts are modules of
the program that made the call, so there are no files that export and evaluate could read.
"""


@dataclass(frozen=True)
class ModuleRun:
    """A fit's steps in a run folder, saved after every `every` steps and the last one.

    Args:
        folder: The run.
        steps: Of the whole fit.
        every: Steps between two snapshots.
        description: Everything that the coefficients depend on, as JSON data.
    """

    folder: RunFolder
    steps: int
    every: int
    description: Mapping[str, Any]

    def take(self, stepping: ModuleSteps) -> list[Mapping[str, float]]:
        """The steps that are left; returns the losses of all steps.

        Raises:
            ValueError: the folder's run has other models or settings, is used by another process, or the
                loaders give other batches than before.
        """
        with in_use(self.folder, "tm.fit_module"):
            snapshot = find_snapshot(self.folder, "auto", first=True)
            self._check(snapshot)
            self.folder.create(self.description)
            write_whole(self.folder.path / "README.md", README)
            done, log = snapshot.step if snapshot else 0, JsonLines(self.folder.metrics)
            experts, groups = stepping.coefficients.raw.shape
            rewind(self.folder, done, (experts, groups), [log])
            if snapshot:
                _restore(stepping, snapshot)
                self.folder.drop_snapshots_before(done)
            else:
                append(self.folder.trajectory, 0, stepping.coefficients())
            losses = _logged(log, stepping)
            for number in range(done, self.steps):
                losses.append(stepping.step(number))
                self._save(stepping, log, number + 1, losses[-1])
            return losses

    def _check(self, snapshot: Snapshot | None) -> None:
        self.folder.check(self.description)
        made = json.loads(snapshot.content["trainmerge"]) if snapshot else self.description
        if snapshot and (different := differences(made, self.description)):
            raise ValueError(f"{snapshot.path} was made with different models or settings:\n{different}")

    def _save(self, stepping: ModuleSteps, log: JsonLines, step: int, losses: Mapping[str, float]) -> None:
        """Log a step and, where it is due, save a snapshot; the logs up to it are on disk before."""
        named = {f"{LOSS}{name}": loss for name, loss in losses.items()}
        log.log_metrics({"loss": sum(losses.values()), **named}, step - 1)
        append(self.folder.trajectory, step, stepping.coefficients())
        if step % self.every and step < self.steps:
            return
        for file in (self.folder.metrics, self.folder.trajectory):
            sync(file)
        with new_snapshot(self.folder, stepping.coefficients, step, self.steps) as path:
            torch.save(_state(stepping, step, self.description), path)


def describe_modules(
    module: nn.Module, models: PlainModels, coefficients: Coefficients, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a fit of modules depends on but its batches, whose digests snapshots have.

    `settings` are its own: dataclasses, numbers, or functions, which are known by their names.
    """
    states = {"base": models.base, **models.compared.experts}
    recipe = {name: _plain(settings[name]) for name in ("preprocess", "grouping", "ignore", "buffers")}
    return {
        "experts": list(coefficients.experts),
        "checksums": {name: {"state": content_sha256(_tensors(own))} for name, own in states.items()},
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "calibration": {},
        "data": {},
        "recipe": recipe,
        "layout": coefficients.layout.identity(),
        "start": hashlib.sha256(coefficients().detach().cpu().numpy().tobytes()).hexdigest(),
        **{name: _plain(value) for name, value in settings.items() if name not in recipe},
    }


def _plain(value: Any) -> Any:
    """A setting as JSON data."""
    if isinstance(value, nn.Module | torch.optim.Optimizer):
        return repr(value)
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        state = {key: str(own) for key, own in sorted(value.state_dict().items())}
        return f"{type(value).__name__} {state}"
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    plain = is_dataclass(value) or not callable(value)
    return to_config(value) if plain else f"{type(value).__module__}.{type(value).__qualname__}"


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sorted(state.items()) if isinstance(value, torch.Tensor)}


def _state(stepping: ModuleSteps, step: int, description: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "global_step": step,
        "state_dict": {"coefficients.raw": stepping.coefficients.raw.detach().cpu()},
        "trainmerge": json.dumps(description),
        "optimizer": stepping.optimizer.state_dict(),
        "lr_scheduler": stepping.scheduler.state_dict() if stepping.scheduler else {},
        "combine": stepping.combine.state_dict() if stepping.combine else {},
        "loss_scale": stepping.tasks.merged.loss_scale.state_dict(),
        "random": torch.get_rng_state(),
        "batches": {stream.name: stream.digest for stream in stepping.streams},
    }


def _restore(stepping: ModuleSteps, snapshot: Snapshot) -> None:
    """Draw the batches again, and continue with the snapshot's state.

    Raises:
        ValueError: other batches than those of the snapshot.
    """
    content = snapshot.content
    for _ in range(snapshot.step):
        for stream in stepping.streams:
            stream.take()
    now = {stream.name: stream.digest for stream in stepping.streams}
    if changed := [name for name, digest in content["batches"].items() if now[name] != digest]:
        raise ValueError(
            f"{snapshot.path}: the loaders of {changed} give other batches than in its first {snapshot.step} "
            "steps, so the fit cannot go on: give lists, or a DataLoader that shuffles by a generator of "
            "its own, seeded before each call"
        )
    with torch.no_grad():
        stepping.coefficients.raw.copy_(content["state_dict"]["coefficients.raw"])
    stepping.optimizer.load_state_dict(content["optimizer"])
    if stepping.scheduler:
        stepping.scheduler.load_state_dict(content["lr_scheduler"])
    if stepping.combine:
        stepping.combine.load_state_dict(content["combine"])
    stepping.tasks.merged.loss_scale.load_state_dict(content["loss_scale"])
    torch.set_rng_state(content["random"])


def _logged(log: JsonLines, stepping: ModuleSteps) -> list[Mapping[str, float]]:
    """The losses of the steps in a run's metrics."""
    names: Sequence[str] = [stream.name for stream in stepping.streams]
    rows = read_json_lines(log.path) if log.path.exists() else []
    return [{name: float(row[f"{LOSS}{name}"]) for name in names} for row in rows]
