"""One fit on 1, 2 and 4 processes: the same coefficients, data parallel and sharded.

`run` spawns the processes; each of them does many fits one after another, so that tests only compare.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainmerge as tm
from tests.ranks import Ranks, run
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.calibration import Calibration
from trainmerge.module import MergeModule
from trainmerge.recipe import calibration_files
from trainmerge.run_folder import RunFolder

STEPS = 3


def world_fit(root: Path, run_folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """A fit of one process's part; returns coefficients and what the loss of each step was."""
    settings = dict(settings)
    merge = settings.pop("recipe", None) or recipe(root)
    precision, steps = settings.pop("precision", None), settings.pop("steps", STEPS)
    batch_size = settings.pop("batch_size", 6)
    callbacks = settings.pop("callbacks", [])
    module = tm.MergeModule(
        merge,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        workspace=str(RunFolder(run_folder).workspace),
        **settings,
    )
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=batch_size, max_length=16)
    trainer = tm.make_trainer(
        run_folder, save_every=2, max_steps=steps, accelerator="cpu", enable_progress_bar=False,
        devices=processes, strategy="ddp" if processes > 1 else "auto", precision=precision,
        callbacks=callbacks,
    )  # fmt: skip
    tm.fit(module, data, trainer, run_folder)
    return {"coefficients": module.coefficients().detach().cpu().clone(), "start": module.start}
