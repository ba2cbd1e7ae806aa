"""Which of the Lightning Trainer's arguments a fit takes, and what to set instead of the others."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import pytorch_lightning as pl

SETTINGS: dict[str, Any] = {
    "max_epochs": -1,  # steps count; an epoch is what is left of them
    "use_distributed_sampler": False,  # an item is a step, which all processes share
    "enable_checkpointing": False,  # Snapshots does it
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}
STEPS = "a fit counts steps: set trainer.max_steps"
ORDER = "each step has its examples: set data.max_examples, or trainer.max_steps"
DECIDED = {
    "default_root_dir": "it is the run folder: set --run",
    "fast_dev_run": "set trainer.max_steps to a few",
    "max_epochs": STEPS,
    "min_epochs": STEPS,
    "min_steps": STEPS,
    "limit_train_batches": ORDER,
    "overfit_batches": ORDER,
    "reload_dataloaders_every_n_epochs": ORDER,
    "accumulate_grad_batches": "set data.batch_size; model.tasks_per_backward saves memory",
    "gradient_clip_val": "set model.clip",
    "gradient_clip_algorithm": "set model.clip, a norm",
    "enable_checkpointing": "set --save_every",
}


def trainer_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """SETTINGS, and what is given otherwise than Lightning has it by default.

    Raises:
        ValueError: an argument that a fit decides itself.
    """
    defaults = {
        name: argument.default for name, argument in signature(pl.Trainer.__init__).parameters.items()
    }
    changed = {key: value for key, value in given.items() if value is not None and value != defaults.get(key)}
    same = {key for key, value in changed.items() if key in SETTINGS and value == SETTINGS[key]}
    if refused := [f"trainer.{key}: {DECIDED[key]}" for key in changed if key in DECIDED and key not in same]:
        raise ValueError("; ".join(refused))
    return {**SETTINGS, **changed}
