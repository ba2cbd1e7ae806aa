"""From a configuration and arguments to module, data and trainer."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.trainer import make_trainer
from trainmerge.run.config import read_yaml
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe, calibration_files


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
