"""A whole run: check, resume or begin, fit, save the coefficients."""

import warnings
from pathlib import Path

import pytorch_lightning as pl

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.begin import Snapshot, begin_run, find_snapshot
from trainmerge.fitting.held_out_stopping import check_held_out
from trainmerge.fitting.keep_better import save_better
from trainmerge.fitting.learned import share_reached
from trainmerge.fitting.memory_budget import watch_memory
from trainmerge.fitting.model_settings import check_data, needs_examples
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.optimisation import check_optimisation
from trainmerge.fitting.outcome import (
    check_learned,
    save_best,
    save_end,
    save_start,
    warn_if_loss_did_not_fall,
)
from trainmerge.fitting.plan_steps import cut_steps, keep_schedule, plan_steps
from trainmerge.fitting.preflight import check_heads, check_rounds, check_tasks
from trainmerge.fitting.settle import settle
from trainmerge.fitting.snapshots import Snapshots
from trainmerge.fitting.trainer import check_folder, check_strategy
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use
from trainmerge.system.distributed import is_collective_error
from trainmerge.system.memory import parse_size


def fit(
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    run: str | Path,
    resume: str = "auto",
    config: str | None = None,
    memory: str | None = None,
) -> RunFolder:
    """Learn the coefficients in a run folder, resuming from its last snapshot as `resume` selects.

    With `trainer.max_steps` 0 nothing is learned: the run folder gets the starting coefficients of `module`,
    and can be exported. This is how closed-form methods run. It needs calibration data only if a preprocessor
    or preset uses them.

    Args:
        module: The merge to learn.
        data: The calibration data.
        trainer: From `make_trainer`, with the same `run`.
        run: The run folder; created if it does not exist.
        resume: `auto` resumes the folder's run if there is one, `never` starts anew, a path resumes from it.
        config: The text of the run's `config.yaml`.
        memory: The process's memory limit, such as `8GiB`, without mapped files: steps are split into smaller
            micro-batches until the plan fits.

    Raises:
        TypeError: `module` is no MergeModule.
        ValueError: the run or the checkpoint was made with different experts, data or settings; non-finite
            weights; invalid settings; a trainer of another run folder; another process changes the run.
    """
    if not isinstance(module, MergeModule):
        raise TypeError(f"fit takes a MergeModule; tm.fit_module learns merges of a {type(module).__name__}")
    check_folder(trainer, Path(run))
    check_settings(module, data, trainer)
    if limit := parse_size(memory) if memory else 0:
        cut_steps(module, data, trainer, limit)
    elif trainer.max_steps:
        plan_steps(module, data, trainer)
    folder = RunFolder(Path(run))
    with in_use(folder, "trainmerge fit", first=trainer.is_global_zero):
        fit_alone(folder, module, data, trainer, resume, config, limit)
    return folder


def fit_alone(
    folder: RunFolder,
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    resume: str = "auto",
    config: str | None = None,
    limit: int = 0,
    following: int = 0,
) -> None:
    """`fit` after its checks, in a folder that no other process changes.

    Args:
        folder: The run.
        module: The merge to learn.
        data: The calibration data.
        trainer: From `make_trainer`.
        resume: As in `fit`.
        config: As in `fit`.
        limit: The process's memory limit in bytes; 0 without.
        following: The evaluations of a search that follows a fit without steps.
    """
    snapshot = find_snapshot(folder, resume, first=trainer.is_global_zero)
    if snapshot:
        keep_schedule(module, snapshot, planned=bool(limit))
    if trainer.is_global_zero:  # the other processes wait for this when the fit begins
        begin_run(folder, module, data, trainer, snapshot, config)
    if trainer.max_steps:
        take_steps(folder, module, data, trainer, snapshot, limit)
    elif trainer.is_global_zero:
        save_start(folder, module, data, following)
    if trainer.is_global_zero:
        settle(folder, module, data)


def take_steps(
    folder: RunFolder,
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    snapshot: Snapshot | None,
    limit: int,
) -> None:
    """Run the remaining steps, if any, and save the coefficients in the run folder."""
    done = snapshot is not None and snapshot.step >= trainer.max_steps
    if not done or module.keep_better:
        with watch_memory(limit):
            learn(folder, module, data, trainer, snapshot.path if snapshot else None)
    if module.keep_better:
        save_better(module, data, folder)
    elif trainer.is_global_zero:
        if done and snapshot:
            save_end(folder, module, snapshot)
        save_best(folder, module, trainer, snapshot)
        warn_if_loss_did_not_fall(folder)


def learn(
    folder: RunFolder, module: MergeModule, data: Calibration, trainer: pl.Trainer, checkpoint: Path | None
) -> None:
    """Lightning's fit, from a checkpoint if there is one.

    Raises:
        Preempted: stopped by a signal; everything is saved.
        ConnectionError: another process of the fit ended.
        ValueError: no step was made.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    (snapshots,) = [callback for callback in callbacks if isinstance(callback, Snapshots)]
    with warnings.catch_warnings(), snapshots.listening():
        # The data module resumes mid-epoch by itself; Lightning checks the loader only.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except RuntimeError as error:
            if trainer.world_size > 1 and is_collective_error(error):
                raise ConnectionError(
                    f"process {trainer.global_rank} lost another process of the fit, which was killed or "
                    "failed (see its own output); run the same command again to resume from the last "
                    f"snapshot. ({str(error).splitlines()[0]})"
                ) from error
            raise
    share_reached(module.resident.merged)
    if trainer.is_global_zero:
        check_learned(folder, module)


def check_settings(module: MergeModule, data: Calibration, trainer: pl.Trainer) -> None:
    """Raise ValueError for settings that cannot work or would silently change what is learned."""
    if trainer.max_steps < 0:
        raise ValueError(
            "set trainer.max_steps, the number of optimizer steps; 0 merges with the starting coefficients"
        )
    if str(trainer.precision) in ("bf16-true", "16-true", "transformer-engine"):
        raise ValueError(
            f"precision {trainer.precision} would round the coefficients; use bf16-mixed or 16-mixed"
        )
    check_strategy(trainer)
    check_held_out(trainer, data, module.keep_better)
    if trainer.max_steps:
        check_optimisation(module, trainer.strategy.root_device)
    if data.batch_size < trainer.world_size:
        raise ValueError(
            f"data.batch_size {data.batch_size} leaves some of {trainer.world_size} processes without an "
            f"example of each expert: set it to {trainer.world_size} or more"
        )
    check_heads(module)
    if trainer.max_steps or needs_examples(module.recipe, module.initial):
        check_data(module.recipe, module.opened, data, module.settings.sharded)
        check_rounds(module, data)
        check_tasks(module, data)
