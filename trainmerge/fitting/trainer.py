"""Lightning's Trainer for a fit: the accepted arguments and strategies, and what to set instead of others."""

import os
import sys
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)

from trainmerge.fitting.loggers import LogCoefficients
from trainmerge.fitting.metrics_log import JsonLines, TrajectoryLog
from trainmerge.fitting.plan_fit import Precision
from trainmerge.fitting.progress import progress_bar
from trainmerge.fitting.snapshots import Snapshots
from trainmerge.fitting.usage_log import UsageLog
from trainmerge.run.folder import RunFolder
from trainmerge.system.ranges import check_option
from trainmerge.system.text import reason

SETTINGS: dict[str, Any] = {
    "max_epochs": -1,  # a fit counts steps; its single epoch is the remaining ones
    "use_distributed_sampler": False,  # an item is a step, split over all processes
    "enable_checkpointing": False,  # Snapshots does it
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}
NEED_LIBRARIES = ("accelerator", "strategy", "precision", "plugins", "profiler")
STEPS = "a fit counts steps: set trainer.max_steps"
ORDER = "the step number determines the examples: set data.max_examples, or trainer.max_steps"
DECIDED = {
    "default_root_dir": "the run folder is used: set --run",
    "fast_dev_run": "set trainer.max_steps to a few",
    "max_epochs": STEPS,
    "min_epochs": STEPS,
    "min_steps": STEPS,
    "limit_train_batches": ORDER,
    "overfit_batches": ORDER,
    "reload_dataloaders_every_n_epochs": ORDER,
    "accumulate_grad_batches": "set data.batch_size; model.tasks_per_backward saves memory",
    "gradient_clip_val": "set model.clip",
    "gradient_clip_algorithm": "set model.clip, which clips the norm",
    "enable_checkpointing": "set --save-every",
}


def make_trainer(run: str | Path, save_every: int = 50, **arguments: Any) -> pl.Trainer:
    """A Lightning Trainer that writes into a run folder; `arguments` are the Trainer's own.

    Raises:
        ValueError: `save_every` is not positive, an argument is set by the fit itself, or the folder cannot
            be written.
    """
    check_option("run", run, str | Path)
    check_option("save_every", save_every, int, "[1, inf)")
    check_option("trainer.max_steps", arguments.get("max_steps"), int | None, f"[-1, {sys.maxsize}]")
    folder = RunFolder(Path(run))
    folder.check_place()
    given_callbacks = arguments.pop("callbacks", None) or []
    if any(isinstance(callback, pl.callbacks.EarlyStopping) for callback in given_callbacks):
        raise ValueError(
            "EarlyStopping acts at the end of an epoch, which a fit never reaches: use "
            "trainmerge.StopWhenFlat instead"
        )
    callbacks = [*given_callbacks, TrajectoryLog(folder), UsageLog(folder), Snapshots(folder, save_every)]
    if arguments.pop("enable_progress_bar", None) is not False:
        callbacks.append(progress_bar())
    bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    given = trainer_arguments(arguments)
    loggers = given.pop("logger", None)
    more = (
        loggers if isinstance(loggers, list) else [loggers] if isinstance(loggers, pl.loggers.Logger) else []
    )
    if more:
        callbacks.insert(0, LogCoefficients(more))
    return _built(
        **given,
        callbacks=callbacks,
        logger=[JsonLines(folder.metrics), *more],
        enable_progress_bar=bar,
        default_root_dir=str(folder.path),
    )


def _built(**arguments: Any) -> pl.Trainer:
    """Lightning's Trainer.

    Raises:
        ValueError: a library that an argument needs is not installed.
    """
    try:
        return pl.Trainer(**arguments)
    except ImportError as error:
        asked = {key: arguments[key] for key in NEED_LIBRARIES if key in arguments}
        raise ValueError(f"trainer: {asked} needs a library: {reason(error)}") from error


def trainer_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """SETTINGS, and the given arguments that differ from Lightning's defaults.

    Raises:
        ValueError: an argument that the fit itself sets.
    """
    defaults = {
        name: argument.default for name, argument in signature(pl.Trainer.__init__).parameters.items()
    }
    changed = {key: value for key, value in given.items() if value is not None and value != defaults.get(key)}
    same = {key for key, value in changed.items() if key in SETTINGS and value == SETTINGS[key]}
    if refused := [f"trainer.{key}: {DECIDED[key]}" for key in changed if key in DECIDED and key not in same]:
        raise ValueError("; ".join(refused))
    return {**SETTINGS, **changed}


def check_folder(trainer: pl.Trainer, run: Path) -> None:
    """Raise ValueError if the trainer does not write into this run folder."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    folders = [callback.folder.path for callback in callbacks if isinstance(callback, Snapshots)]
    if not folders:
        raise ValueError(
            "this trainer saves no snapshots: make it with trainmerge.make_trainer(run, max_steps=...)"
        )
    if folders[0].resolve() != run.resolve():
        raise ValueError(
            f"the trainer writes into {folders[0]}, and the fit into {run}: give make_trainer and fit the "
            "same run folder"
        )


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise ValueError for a strategy that would give wrong results, or none."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} would shard the coefficients or not reduce their "
            "gradient: use ddp, and model.sharded true for a model that does not fit on one device"
        )
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise ValueError("trainer.strategy: use ddp; forked and spawned processes cannot share mapped files")
    check_nodes(trainer)
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise ValueError(f"trainer.strategy {type(strategy).__name__}: several processes need ddp")


def check_nodes(trainer: pl.Trainer) -> None:
    """Raise ValueError for a process that would wait for others that nothing tells it of."""
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    told = {"NODE_RANK", "MASTER_ADDR"} & os.environ.keys()
    if trainer.num_nodes > 1 and isinstance(cluster, LightningEnvironment) and not told:
        raise ValueError(
            f"trainer.num_nodes is {trainer.num_nodes}, and nothing says where the other nodes are: start "
            "each by torchrun or SLURM (configs/torchrun.sh, configs/slurm.sh), or set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK"
        )


def precision_of(trainer: pl.Trainer) -> Precision:
    """The autocast of the trainer's steps."""
    return trainer.strategy.precision_plugin.forward_context
