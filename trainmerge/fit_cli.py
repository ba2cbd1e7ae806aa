"""`trainmerge fit`: LightningCLI over the recipe, the module and the data, in a fixed run folder."""

import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from trainmerge.calibration import Calibration
from trainmerge.callbacks import EXIT_PREEMPTED, Preempted
from trainmerge.config import read_yaml
from trainmerge.module import MergeModule
from trainmerge.plan import Plan
from trainmerge.planning import plan_fit, print_plan
from trainmerge.recipe import Recipe, calibration_files
from trainmerge.run import fit, precision_of
from trainmerge.run_folder import RunFolder
from trainmerge.trainer import make_trainer


class FitCLI(LightningCLI):
    """Adds `recipe`, `run`, `resume`, `save_every` and `report`; the rest is Lightning's own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our keys, and the links that spare a user from saying a thing twice."""
        parser.add_argument("--run", type=str, required=True, help="Run folder; made if it is not there.")
        parser.add_argument(
            "--resume", type=str, default="auto",
            help="auto: go on with the folder's run if there is one. never: begin. Or a checkpoint's path.",
        )  # fmt: skip
        parser.add_argument("--save_every", type=int, default=50, help="Steps between snapshots.")
        parser.add_argument("--report", type=bool, default=True, help="Draw the run when it has ended.")
        parser.add_argument(
            "--memory", type=str, default="",
            help="What the fit may hold, as 8GiB: it is cut to fit or refused. Mapped files are not counted.",
        )  # fmt: skip
        parser.add_argument(
            "--dry_run", type=bool, default=False, help="Print what the fit will hold and take, and stop."
        )
        parser.add_class_arguments(Recipe, "recipe")
        parser.link_arguments("recipe", "model.recipe", apply_on="instantiate")
        parser.link_arguments("recipe", "data.files", calibration_files, apply_on="instantiate")
        parser.link_arguments("recipe", "data.test_files", test_files, apply_on="instantiate")
        parser.link_arguments("recipe.base", "data.tokenizer")
        parser.link_arguments("run", "model.workspace", lambda run: str(RunFolder(Path(run)).workspace))
        parser.link_arguments("seed_everything", "data.seed", int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse configuration files that say a thing twice, an expert above all."""
        super().parse_arguments(parser, args)
        for file in self.config.get("config") or []:
            read_yaml(Path(file.absolute))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer of `trainer.make_trainer`, with the configuration's arguments."""
        arguments = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return make_trainer(self.config["run"], self.config["save_every"], **arguments)


def fit_command(arguments: list[str]) -> int:
    """Parse, build everything (headers are checked here), and fit."""
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec")  # Lightning 2.6 on torch 2.13
    try:
        cli = parse(arguments)
    except ArgumentError as error:
        raise ValueError(f"{error}\nEvery option: trainmerge fit --help") from error
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise ValueError(error) from error
    folder = RunFolder(Path(cli.config["run"]))
    text = cli.parser.dump(cli.config, skip_validation=True)
    if cli.config["dry_run"]:
        print_plan(plan_of(cli))
        return 0
    try:
        fit(
            cli.model,
            cli.datamodule,
            cli.trainer,
            folder.path,
            cli.config["resume"],
            config=text,
            memory=cli.config["memory"],
        )
    except Preempted as stop:
        if not cli.trainer.is_global_zero:
            return 0  # else Lightning's launcher, which watches it, kills the first process before it says 75
        print(stop)
        return EXIT_PREEMPTED
    except MisconfigurationException as error:
        raise ValueError(error) from error
    if cli.trainer.is_global_zero:
        if cli.config["report"]:
            draw(folder)
        print(f"coefficients: {folder.coefficients}\nnext: trainmerge export {folder.path} OUT")
    return 0


def plan_of(cli: FitCLI) -> Plan:
    """What the fit would hold and take."""
    return plan_fit(cli.model, cli.datamodule, precision_of(cli.trainer))


def show_plan(config: Path) -> None:
    """Print what a fit of this configuration would hold and take, or why there is no telling."""
    with tempfile.TemporaryDirectory() as place:
        try:
            plan = plan_of(parse(["--config", str(config), "--run", f"{place}/run"]))
        except (ArgumentError, ValueError, MisconfigurationException) as error:
            print(f"no plan of memory and time: {error}")
            return
    print_plan(plan)


def draw(folder: RunFolder) -> None:
    """`trainmerge report`, in a process of its own: whatever happens to a picture, the fit has ended well."""
    command = [sys.executable, "-m", "trainmerge.cli", "report", str(folder.path)]
    if subprocess.run(command, check=False).returncode:
        print(
            f"no report was drawn; the run is whole. Again: trainmerge report {folder.path}", file=sys.stderr
        )


def parse(arguments: list[str]) -> FitCLI:
    """Parse and build module, data and trainer."""
    for chatty in ("pytorch_lightning", "lightning_fabric"):  # notes on hardware and seeds, and adverts
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The launcher of further processes runs sys.argv again, so it must stay; hence `args` beside it.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return FitCLI(
            MergeModule,
            Calibration,
            run=False,
            args=arguments,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # `model.optimizer` is the one place
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "trainmerge fit", "exit_on_error": False},
        )


def test_files(recipe: Recipe) -> dict[str, str]:
    """Expert -> its test examples, where it has some."""
    return {name: expert.test for name, expert in recipe.experts.items() if expert.test}
