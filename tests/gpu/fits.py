"""Whole fits on the device: the CPU's coefficients, and a resumed fit that is the one without a stop."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import trainmerge as tm
from tests.bounds import assert_within, fitted_bound
from tests.gpu.setting import Row, Setting, row
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.kernels import using
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files

STEPS, STOP, RATE = 6, 3, 0.05


def fitted(merge: Recipe, run: Path, accelerator: str, steps: int = STEPS) -> Tensor:
    """The coefficients after a fit, by SGD: its steps are proportional to gradients, as the bound needs."""
    module = tm.MergeModule(
        merge,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        workspace=str(RunFolder(run).workspace),
    )
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=16)
    trainer = tm.make_trainer(
        run, save_every=STOP, max_steps=steps, accelerator=accelerator, devices=1, enable_progress_bar=False
    )
    tm.fit(module, data, trainer, run)
    return module.coefficients().detach().cpu().clone()


def worlds(place: Path, tiny: bool) -> dict[str, Recipe]:
    """Language models of two dense experts; classifiers with two dense experts and an adapter."""
    write_languages(place / "words")
    found = {"words": languages_recipe(place / "words")}
    if not tiny:
        write_world(place / "heads")
        found["heads"] = recipe(place / "heads")
    return found


def run(setting: Setting) -> Iterator[Row]:
    """Raises AssertionError where the device's coefficients are not the CPU's, or a resumed fit differs."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    accelerator, bound = "gpu" if setting.cuda else "cpu", fitted_bound(STEPS, RATE)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for world, merge in worlds(place, setting.tiny).items():
            with using("eager"):
                want = fitted(merge, place / world / "cpu", "cpu")
            for backend in setting.backends:
                folder = place / world / backend
                with using(backend):
                    got = fitted(merge, folder, accelerator)
                    fitted(merge, place / world / f"{backend}-stopped", accelerator, STOP)
                    resumed = fitted(merge, place / world / f"{backend}-stopped", accelerator)
                assert_within(got, want, bound)
                assert_within(resumed, got, bound)
                apart = float((got - want).abs().max())
                yield row(f"fit_{world}_{backend}_from_cpu", apart, f"coefficient, at most {bound:.2g}")
                same = float((resumed - got).abs().max())
                yield row(f"resume_{world}_{backend}_apart", same, "coefficient; 0 if all bits are equal")
