"""The whole run on one page: check, resume or begin, fit, leave the coefficients."""

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from trainmerge.calibration import Calibration
from trainmerge.callbacks import JsonLines, Snapshots, progress_bar
from trainmerge.checkpoints import check_finite
from trainmerge.config import to_config, write_config
from trainmerge.module import MergeModule
from trainmerge.run_folder import RunFolder
from trainmerge.storage import sha256

SETTINGS: dict[str, Any] = {
    "max_epochs": -1,  # steps count; an epoch is what is left of them
    "use_distributed_sampler": False,  # it slices each step's examples itself
    "enable_checkpointing": False,  # Snapshots does it
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


def make_trainer(run: str | Path, save_every: int = 50, **arguments: Any) -> pl.Trainer:
    """A Lightning Trainer that writes into a run folder; `arguments` are the Trainer's own."""
    folder = RunFolder(Path(run))
    callbacks = [*(arguments.pop("callbacks", None) or []), Snapshots(folder, save_every)]
    if arguments.pop("enable_progress_bar", None) is not False:
        callbacks.append(progress_bar())
    bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    logger = arguments.pop("logger", None)
    loggers = [JsonLines(folder.metrics)] + ([] if not logger or logger is True else [logger])
    given = {key: value for key, value in arguments.items() if value is not None}
    return pl.Trainer(
        **{**SETTINGS, **given},
        callbacks=callbacks,
        logger=loggers,
        enable_progress_bar=bar,
        default_root_dir=str(folder.path),
    )


def fit(
    module: MergeModule, data: Calibration, trainer: pl.Trainer, run: str | Path, resume: str = "auto"
) -> RunFolder:
    """Learn the coefficients in a run folder, from its last snapshot if `resume` says so.

    Args:
        module: What is learned.
        data: What it is learned from.
        trainer: From `make_trainer`, with the same `run`.
        run: The run folder; made if it is not there.
        resume: `auto` goes on with the folder's run if there is one, `never` begins, a path begins from it.

    Raises:
        ValueError: the folder's run was made from other experts, data or settings; non-finite weights.
    """
    folder = RunFolder(Path(run))
    checkpoint = folder.resume_from(resume)
    folder.create(describe(module, data))
    check_finite(module.opened.base, module.opened.task_vectors, experts=module.opened.folders)
    write_config(module.recipe, "recipe", folder.recipe)
    step = saved_step(checkpoint)
    for logger in trainer.loggers:
        if isinstance(logger, JsonLines):
            logger.keep_until(step)
    if step >= trainer.max_steps:
        print(f"{folder.path}: finished at step {step}; raise trainer.max_steps to go on")
        return folder
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="You're resuming from a checkpoint that ended before the epoch"
        )
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    warn_if_unmoved(module)
    return folder


def describe(module: MergeModule, data: Calibration) -> dict[str, Any]:
    """What a run depends on: a resumed run must have the same."""
    return {
        "checksums": module.opened.checksums,
        "calibration": {name: sha256(Path(file)) for name, file in data.files.items()},
        "data": data.settings(),
        "recipe": to_config(module.recipe),
        "objective": to_config(module.objective),
        "constraint": to_config(module.coefficients.constraint),
        "anchor": module.anchor,
        "start": hashlib.sha256(module.start.numpy().tobytes()).hexdigest(),
        "optimizer": str(module.make_optimizer(module.coefficients.parameters())),
    }


def saved_step(checkpoint: Path | None) -> int:
    """The step a checkpoint was saved after; 0 for none.

    Raises:
        ValueError: the file is damaged, or no checkpoint of a fit.
    """
    if checkpoint is None:
        return 0
    try:
        return int(torch.load(checkpoint, weights_only=True)["global_step"])
    except (RuntimeError, KeyError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint}: not a checkpoint that a fit can go on from ({error})") from error


def warn_if_unmoved(module: MergeModule) -> None:
    """Say so when learning changed nothing that matters: a merge at its start is no learned merge."""
    moved = (module.coefficients().detach().cpu() - module.start).abs().max().item()
    if moved < 1e-4:
        warnings.warn(
            f"the coefficients moved by {moved:.1e} at most: raise the learning rate or trainer.max_steps",
            stacklevel=2,
        )
