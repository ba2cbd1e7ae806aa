"""All that a fit of these settings would refuse before its first step, for whoever asks without a fit."""

from collections.abc import Callable, Iterator

import pytorch_lightning as pl

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.model_settings import check_data, needs_examples
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.optimisation import check_optimisation
from trainmerge.fitting.preflight import check_heads, check_rounds, check_tasks
from trainmerge.model.embedding import unread_modules


def refusals(module: MergeModule, data: Calibration, trainer: pl.Trainer) -> list[str]:
    """One sentence per refusal, in the words of `fit`; no weight is read."""
    lines = [line for check in _checks(module, data, trainer) for line in _refused(check)]
    return list(dict.fromkeys(lines))


def unread(module: MergeModule) -> list[str]:
    """What base and experts have that only some objectives and commands need, and that is not read."""
    folders = {"": module.opened.base.path, **{f"{n}: ": p for n, p in module.recipe.folders.items()}}
    folders.pop("base: ", None)
    return [f"{name}{line}" for name, folder in folders.items() for line in unread_modules(folder)]


def _checks(module: MergeModule, data: Calibration, trainer: pl.Trainer) -> Iterator[Callable[[], None]]:
    yield lambda: check_heads(module)
    if trainer.max_steps:
        yield lambda: check_optimisation(module, trainer.strategy.root_device)
    if trainer.max_steps or needs_examples(module.recipe, module.initial):
        yield lambda: check_data(module.recipe, module.opened, data, module.settings.sharded)
        yield lambda: check_rounds(module, data)
        yield lambda: check_tasks(module, data)


def _refused(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []
