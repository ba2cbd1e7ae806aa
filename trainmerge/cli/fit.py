"""`trainmerge fit`: LightningCLI over the recipe, the module and the data, in a fixed run folder."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser

from trainmerge.cli.fit_words import fit_words
from trainmerge.fitting.fit import fit
from trainmerge.fitting.fit_parser import FitCLI
from trainmerge.fitting.from_config import FitSettings, build_settings, from_config
from trainmerge.fitting.model_settings import check_data
from trainmerge.fitting.plan_fit import plan_fit
from trainmerge.fitting.plan_steps import plan_steps
from trainmerge.fitting.preflight import check_heads, check_tasks
from trainmerge.fitting.refusals import refusals, unread
from trainmerge.fitting.snapshots import Preempted
from trainmerge.fitting.trainer import precision_of
from trainmerge.inspection.findings import Finding
from trainmerge.plan.plan import Plan
from trainmerge.plan.plan_model import print_plan
from trainmerge.run.config import read_settings
from trainmerge.run.folder import RunFolder
from trainmerge.run.trust import foreign_modules
from trainmerge.system.threads import ThreadChoice


class CommandLine(FitCLI):
    """Accepts CONFIG and RUN, bare flags and dashes."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Convert the words first."""
        super().parse_arguments(parser, fit_words(parser, args))


def fit_command(words: list[str], chosen: ThreadChoice | None = None) -> int:
    """Parse, build everything (this checks headers), and fit; `chosen`: threads, if we chose them."""
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec")  # Lightning 2.6 on torch 2.13
    settings = build_settings(words, CommandLine)
    trainer = settings.trainer
    if chosen is not None:
        share_threads(trainer, chosen)
    if settings.dry_run:
        print_plan(plan_of(settings))
        return 0
    try:
        folder = fit(
            settings.module,
            settings.data,
            trainer,
            settings.run,
            settings.resume,
            config=settings.text,
            memory=settings.memory,
        )
    except Preempted as stop:
        if not trainer.is_global_zero:
            return 0  # otherwise Lightning's launcher kills the first process before it prints the reason
        print(f"trainmerge fit: {stop}", file=sys.stderr)
        return stop.code
    except MisconfigurationException as error:
        raise ValueError(error) from error
    if trainer.is_global_zero:
        if settings.report:
            draw(folder)
        command = " ".join(["trainmerge export", str(folder.path), "OUT", *trusted_by(folder)])
        print(f"coefficients: {folder.coefficients}\nnext: {command}")
    return 0


def share_threads(trainer: pl.Trainer, chosen: ThreadChoice) -> None:
    """Divide the threads among the processes that Lightning will launch, which inherit the setting."""
    if trainer.strategy.launcher is not None and trainer.num_devices > 1:
        threads = max(1, chosen.threads // trainer.num_devices)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def plan_of(settings: FitSettings) -> Plan:
    """The fit's plan of memory and time: on a GPU, with the schedule that the fit chooses.

    Raises:
        ValueError: the fit itself would refuse its tasks, or there is no room where `model.vectors` asks.
    """
    module, data, trainer = settings.module, settings.data, settings.trainer
    if trainer.max_steps:
        check_heads(module)
        check_data(module.recipe, module.opened, data, module.settings.sharded)
        check_tasks(module, data)
    return plan_steps(module, data, trainer) or plan_fit(module, data, precision_of(trainer))


class Rehearsal:
    """What `inspect` says of a configuration's fit, which it does not begin.

    Args:
        config: The configuration's file.
        place: A folder for what the fit would write.
    """

    def __init__(self, config: Path, place: Path) -> None:
        self.config, self.place = config, place

    @cached_property
    def _settings(self) -> FitSettings | Exception:
        """The fit's settings, or why there are none."""
        try:
            return from_config(self.config, self.place / "run")
        except Exception as error:  # of any type: it is the user's file, with the user's classes
            return error

    def findings(self) -> Iterator[Finding]:
        """What the fit would refuse, as errors, and its warnings."""
        settings = self._settings
        if isinstance(settings, Exception):
            if isinstance(settings, ValueError) and read_settings(self.config).keys() - {"recipe"}:
                yield Finding("error", " ".join(str(settings).split()))
            return  # a recipe alone is no fit's configuration; `show_plan` says what it lacks
        with warnings.catch_warnings(record=True) as words:
            warnings.simplefilter("always")
            refused = refusals(settings.module, settings.data, settings.trainer)
        yield from (Finding("error", line) for line in refused)
        yield from (Finding("warning", str(word.message)) for word in words)
        for line in unread(settings.module):
            if line not in refused:
                yield Finding("warning", line, "Alignment and Entropy do not need them; Similarity does")

    def show_plan(self) -> Plan | None:
        """Print the plan, or why there is none; returns it."""
        try:
            if isinstance(self._settings, Exception):
                raise self._settings
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are among the findings
                plan = plan_of(self._settings)
        except Exception as error:  # of any type: the model's own code runs, on tensors without values
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            print(f"no plan of memory and time: {kind}{' '.join(str(error).split())}")
            return None
        print_plan(plan)
        return plan


def trusted_by(folder: RunFolder) -> list[str]:
    """The options that let a command read a run with the user's own classes."""
    return [f"--trust={name}" for name in foreign_modules(folder.read_manifest())]


def draw(folder: RunFolder) -> None:
    """`trainmerge report` in its own process, so that a failed figure does not fail the fit."""
    words = ["report", str(folder.path), *trusted_by(folder)]
    if subprocess.run([sys.executable, "-m", "trainmerge.cli", *words], check=False).returncode:
        print(
            f"the report failed; the run is complete. Try again: trainmerge {' '.join(words)}",
            file=sys.stderr,
        )
