"""The whole run on one page: check, resume or begin, fit, leave the coefficients."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from trainmerge.coefficients.coefficients import save_coefficients
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.keep_better import keep_the_better, warn_if_it_never_fell
from trainmerge.fitting.loggers import keep_csv
from trainmerge.fitting.memory_budget import schedule_within, watch_memory
from trainmerge.fitting.metrics_log import JsonLines
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.plan_fit import Precision
from trainmerge.fitting.preflight import check_tasks
from trainmerge.fitting.prepare import check_data
from trainmerge.fitting.provenance import describe, load_snapshot
from trainmerge.fitting.snapshots import Snapshots
from trainmerge.fitting.trainer import check_strategy
from trainmerge.run.config import write_config
from trainmerge.run.folder import RunFolder, differences
from trainmerge.system.atomic import write_whole
from trainmerge.system.memory import parse_size

MANY_HELD = 0.25  # share of coefficients at a bound


def fit(
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    run: str | Path,
    resume: str = "auto",
    config: str | None = None,
    memory: str | None = None,
) -> RunFolder:
    """Learn the coefficients in a run folder, from its last snapshot if `resume` says so.

    With `trainer.max_steps` 0 nothing is learned, and no calibration data is needed unless a preprocessor or
    preset measures something on it: the run folder holds the coefficients that `module` starts with, which is
    how a closed-form method is merged and exported.

    Args:
        module: What is learned.
        data: What it is learned from.
        trainer: From `make_trainer`, with the same `run`.
        run: The run folder; made if it is not there.
        resume: `auto` goes on with the folder's run if there is one, `never` begins, a path begins from it.
        config: A text to keep as the run's `config.yaml`.
        memory: What the process may hold, as `8GiB`: a step is cut until its plan fits, or the fit is
            refused. Mapped files are not counted.

    Raises:
        ValueError: the run, or the checkpoint, was made from other experts, data or settings; non-finite
            weights; settings that cannot work.
    """
    check_settings(module, data, trainer)
    limit = parse_size(memory) if memory else 0
    if limit:
        cut_steps(module, data, trainer, limit)
    folder = RunFolder(Path(run))
    checkpoint = folder.resume_from(resume) if trainer.is_global_zero or resume != "never" else None
    snapshot = load_snapshot(checkpoint) if checkpoint else None
    if trainer.is_global_zero:  # the other processes take its word: they meet it when the fit begins
        begin(folder, module, data, trainer, checkpoint, snapshot, config)
    if trainer.max_steps == 0:
        if trainer.is_global_zero:
            leave_the_start(folder, module, data)
        return folder
    done = snapshot is not None and int(snapshot["global_step"]) >= trainer.max_steps
    if snapshot and done and not module.keep_better:
        if trainer.is_global_zero:
            finish(folder, module, snapshot)
    else:
        with watch_memory(limit):
            learn(module, data, trainer, checkpoint)
        if trainer.is_global_zero and not folder.coefficients.exists():
            raise ValueError("no step was made: raise trainer.max_time")
    if module.keep_better:
        keep_the_better(module, data, folder)
    elif trainer.is_global_zero:
        warn_if_it_never_fell(folder)
    return folder


def cut_steps(module: MergeModule, data: Calibration, trainer: pl.Trainer, limit: int) -> None:
    """Cut the module's step until its plan fits into `limit` bytes.

    Raises:
        ValueError: nothing fits, or the fit is on a device or sharded.
    """
    if trainer.strategy.root_device.type != "cpu":
        raise ValueError("memory is what a processor holds: on a device, look at `--dry_run true` instead")
    if module.settings.sharded and trainer.world_size > 1:
        raise ValueError(
            "memory cuts each process's batch by itself, and shards meet in every pass: leave it out"
        )
    if trainer.max_steps:
        module.schedule = schedule_within(module, data, precision_of(trainer), limit)


def learn(module: MergeModule, data: Calibration, trainer: pl.Trainer, checkpoint: Path | None) -> None:
    """Lightning's fit, from a checkpoint if there is one.

    Raises:
        Preempted: asked to stop by a signal; everything is saved.
        ConnectionError: another process of the fit is gone.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    (snapshots,) = [callback for callback in callbacks if isinstance(callback, Snapshots)]
    with warnings.catch_warnings(), snapshots.listening():
        # The data module resumes by itself, mid-epoch too; Lightning looks at the loader only.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except RuntimeError as error:
            if trainer.world_size > 1 and is_of_a_collective(error):
                raise ConnectionError(
                    f"process {trainer.global_rank} lost another process of the fit, which was killed or "
                    "failed (see its own output); start the same command again to go on from the last "
                    f"snapshot. ({str(error).splitlines()[0]})"
                ) from error
            raise
    if trainer.is_global_zero:
        warn_if_unmoved(module)
        warn_if_at_bound(module)


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether a collective failed, rather than what this process did itself."""
    text = str(error)  # gloo raises plain RuntimeErrors
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )


def precision_of(trainer: pl.Trainer) -> Precision:
    """The autocast of the trainer's steps."""
    return trainer.strategy.precision_plugin.forward_context


def check_settings(module: MergeModule, data: Calibration, trainer: pl.Trainer) -> None:
    """Raise ValueError for settings that cannot work, or would learn something else in silence."""
    if trainer.max_steps < 0:
        raise ValueError("set trainer.max_steps: a fit is a number of optimizer steps; 0 merges as it starts")
    if str(trainer.precision) in ("bf16-true", "16-true", "transformer-engine"):
        raise ValueError(
            f"precision {trainer.precision} would round the coefficients; use bf16-mixed or 16-mixed"
        )
    check_strategy(trainer)
    if data.batch_size < trainer.world_size:
        raise ValueError(
            f"data.batch_size {data.batch_size} leaves some of {trainer.world_size} processes without an "
            f"example of each expert: set it to {trainer.world_size} or more"
        )
    if trainer.max_steps or module.looks_at_data:
        check_data(module.recipe, module.opened, data)
        check_tasks(module, data)


def begin(
    folder: RunFolder,
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    checkpoint: Path | None,
    snapshot: dict[str, Any] | None,
    config: str | None,
) -> None:
    """Write what explains the run, and drop what is later than `snapshot`, `checkpoint`'s content.

    Raises:
        ValueError: non-finite weights; the folder's run, or the snapshot, was made from other things.
    """
    module.opened.verify()
    description = describe(module, data)
    folder.check(description)
    if snapshot and (different := differences(json.loads(snapshot["trainmerge"]), description)):
        raise ValueError(f"{checkpoint} was made from other things:\n{different}")
    module.description = json.dumps(description)
    folder.create(description)
    write_config(module.recipe, "recipe", folder.recipe)
    module.opened.save(folder.sources)
    if config:
        write_whole(folder.config, config)
    step = int(snapshot["global_step"]) if snapshot else 0
    folder.drop_snapshots_after(step)
    keep_csv(trainer.loggers, step)
    for logger in trainer.loggers:
        if isinstance(logger, JsonLines):
            logger.keep_until(step)


def leave_the_start(folder: RunFolder, module: MergeModule, data: Calibration) -> None:
    """A run that learns nothing: its coefficients are those that it starts with."""
    if module.looks_at_data:
        module.load(data)
    save_coefficients(module.coefficients, folder.coefficients)


def finish(folder: RunFolder, module: MergeModule, snapshot: dict[str, Any]) -> None:
    """A run that has had its steps: leave its coefficients, as its last step would have."""
    with torch.no_grad():
        module.coefficients.raw.copy_(snapshot["state_dict"]["coefficients.raw"])
    save_coefficients(module.coefficients, folder.coefficients)
    print(f"{folder.path}: finished at step {snapshot['global_step']}; raise trainer.max_steps to go on")


def warn_if_unmoved(module: MergeModule) -> None:
    """Say so when learning changed nothing that matters: a merge at its start is no learned merge."""
    moved = (module.coefficients().detach().cpu() - module.start).abs().max().item()
    if moved < 1e-4:
        warnings.warn(
            f"the coefficients moved by {moved:.1e} at most: raise the learning rate or trainer.max_steps",
            stacklevel=2,
        )


def warn_if_at_bound(module: MergeModule) -> None:
    """Say so when a bound, rather than the loss, decides many of the coefficients."""
    coefficients = module.coefficients
    with torch.no_grad():
        held = coefficients.constraint.at_bound(coefficients()).float().mean().item()
    if held >= MANY_HELD:
        warnings.warn(
            f"{100 * held:.0f}% of the coefficients sit at a bound of {coefficients.constraint}: widen it, "
            "lower the learning rate, or leave them free",
            stacklevel=2,
        )
