"""The whole run on one page: check, resume or begin, fit, leave the coefficients."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from trainmerge.budget import affordable, within
from trainmerge.calibration import Calibration
from trainmerge.callbacks import JsonLines, Snapshots, progress_bar
from trainmerge.checkpoints import check_finite
from trainmerge.coefficients import save_coefficients
from trainmerge.config import write_config
from trainmerge.folders import write_whole
from trainmerge.memory import parse_size
from trainmerge.module import MergeModule
from trainmerge.planning import Precision
from trainmerge.provenance import describe, load_snapshot
from trainmerge.run_folder import RunFolder, differences
from trainmerge.safeguard import keep_the_better, warn_if_it_never_fell

SETTINGS: dict[str, Any] = {
    "max_epochs": -1,  # steps count; an epoch is what is left of them
    "use_distributed_sampler": False,  # it slices each step's examples itself
    "enable_checkpointing": False,  # Snapshots does it
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


def make_trainer(run: str | Path, save_every: int = 50, **arguments: Any) -> pl.Trainer:
    """A Lightning Trainer that writes into a run folder; `arguments` are the Trainer's own.

    Raises:
        ValueError: `save_every` is not positive, or an argument that the run folder decides.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, not {save_every}")
    if arguments.pop("default_root_dir", None):
        raise ValueError("trainer.default_root_dir is the run folder: set --run instead")
    folder = RunFolder(Path(run))
    callbacks = [*(arguments.pop("callbacks", None) or []), Snapshots(folder, save_every)]
    if arguments.pop("enable_progress_bar", None) is not False:
        callbacks.append(progress_bar())
    bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    given = {key: value for key, value in arguments.items() if value is not None}
    loggers = given.pop("logger", None)
    more = (
        loggers if isinstance(loggers, list) else [loggers] if isinstance(loggers, pl.loggers.Logger) else []
    )
    return pl.Trainer(
        **{**SETTINGS, **given},
        callbacks=callbacks,
        logger=[JsonLines(folder.metrics), *more],
        enable_progress_bar=bar,
        default_root_dir=str(folder.path),
    )


def fit(
    module: MergeModule,
    data: Calibration,
    trainer: pl.Trainer,
    run: str | Path,
    resume: str = "auto",
    config: str = "",
    memory: str = "",
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
    if limit and trainer.strategy.root_device.type != "cpu":
        raise ValueError("memory is what a processor holds: on a device, look at `--dry_run true` instead")
    if limit and trainer.max_steps:
        module.economy = affordable(module, data, precision_of(trainer), limit)
    folder = RunFolder(Path(run))
    checkpoint = folder.resume_from(resume) if trainer.is_global_zero or resume != "never" else None
    description = describe(module, data)
    folder.check(description)
    snapshot = load_snapshot(checkpoint) if checkpoint else None
    if snapshot and (different := differences(json.loads(snapshot["trainmerge"]), description)):
        raise ValueError(f"{checkpoint} was made from other things:\n{different}")
    check_finite(module.opened.base, module.opened.task_vectors, experts=module.opened.folders)
    module.description = json.dumps(description)
    step = int(snapshot["global_step"]) if snapshot else 0
    if trainer.is_global_zero:
        prepare(folder, description, module, trainer, step, config)
    if trainer.max_steps == 0:
        if module.looks_at_data:
            module.load(data)
        save_coefficients(module.coefficients, folder.coefficients)
        return folder
    if snapshot and step >= trainer.max_steps:
        finish(folder, module, snapshot)
    else:
        with warnings.catch_warnings(), within(limit):
            # The data module resumes by itself, mid-epoch too; Lightning looks at the loader only.
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        warn_if_unmoved(module)
    if module.keep_better:
        keep_the_better(module, data, folder)
    else:
        warn_if_it_never_fell(folder)
    return folder


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
    if data.batch_size % trainer.world_size:
        raise ValueError(
            f"data.batch_size {data.batch_size} must be a multiple of {trainer.world_size} processes"
        )
    if trainer.max_steps or module.looks_at_data:
        module.check_data(data)


def prepare(
    folder: RunFolder,
    description: dict[str, Any],
    module: MergeModule,
    trainer: pl.Trainer,
    step: int,
    config: str,
) -> None:
    """Write what explains the run, and drop what is later than `step`: it will be made again."""
    folder.create(description)
    write_config(module.recipe, "recipe", folder.recipe)
    if config:
        write_whole(folder.config, config)
    folder.drop_snapshots_after(step)
    for logger in trainer.loggers:
        if isinstance(logger, JsonLines):
            logger.keep_until(step)


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
