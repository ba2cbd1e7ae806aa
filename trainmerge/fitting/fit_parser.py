"""The parser of a fit's configuration: Lightning's, with our keys, links and words for mistakes."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.mistakes import explain_mistake
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.trainer import make_trainer
from trainmerge.run.config import public_path, public_paths, read_settings
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files, test_files
from trainmerge.run.sections import check_sections
from trainmerge.run.templates import expand
from trainmerge.run.trust import files_checked

TEMPLATES = "trainmerge"  # parser mode: YAML with `recipe.each` as a template of all experts


def load_yaml(text: str) -> Any:
    """The parser's YAML with `recipe.each` filled in and public class paths."""
    return public_paths(expand(get_loader("yaml")(text)))


set_loader(TEMPLATES, load_yaml, (yaml.YAMLError,))


class FitCLI(LightningCLI):
    """Adds `recipe`, `run`, `resume`, `save_every` and `report`; the rest is Lightning's own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our keys, and links between keys that must be equal."""
        parser.add_argument(
            "--run", type=str, required=True, help="Run folder; created if it does not exist."
        )
        parser.add_argument(
            "--resume", type=str, default="auto",
            help="auto: resume the folder's run if there is one. never: start anew. Or a checkpoint's path.",
        )  # fmt: skip
        parser.add_argument("--save_every", type=int, default=50, help="Steps between snapshots.")
        parser.add_argument("--report", type=bool, default=True, help="Write a report at the end.")
        parser.add_argument(
            "--memory", type=str | None, default=None,
            help="Memory limit, such as 8GiB, without mapped files: steps are split to fit, or the fit is "
                "refused.",
        )  # fmt: skip
        parser.add_argument(
            "--dry_run", type=bool, default=False, help="Print the plan of memory and time, and stop."
        )
        parser.add_class_arguments(Recipe, "recipe")
        parser.link_arguments("recipe", "model.recipe", apply_on="instantiate")
        parser.link_arguments("recipe", "data.files", calibration_files, apply_on="instantiate")
        parser.link_arguments("recipe", "data.test_files", test_files, apply_on="instantiate")
        parser.link_arguments("model", "data.tokenizer", _tokenizer, apply_on="instantiate")
        parser.link_arguments("run", "model.workspace", lambda run: str(RunFolder(Path(run)).workspace))
        parser.link_arguments("seed_everything", "data.seed", int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check before parsing what the parser would not, and name its errors in plain words.

        Raises:
            ValueError: as `read_settings`, `check_sections`, `files_checked` and `explain`.
        """
        words = [word.partition("=") for word in args] if isinstance(args, list) else []
        files = [Path(value) for key, _, value in words if key == "--config" and Path(value).is_file()]
        options = {key[2:]: value for key, _, value in words if key != "--config"}
        for key, value in options.items():
            check_sections({key: get_loader("yaml")(value)})
        with files_checked({file: public_paths(read_settings(file)) for file in files}):
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                known = [action.dest for action in parser._actions]
                raise ValueError(explain_mistake(str(error), known, files, list(options))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer of `trainer.make_trainer`, with the configuration's arguments."""
        arguments = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return make_trainer(self.config["run"], self.config["save_every"], **arguments)


def _tokenizer(module: MergeModule) -> str:
    return module.recipe.tokenizer_folder(module.settings.workspace)


def parse(given: list[str] | dict[str, Any], parser: type[FitCLI]) -> FitCLI:
    """Lightning's own parsing and building."""
    # notes on hardware and seeds, and advertisements
    for chatty in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The launcher of further processes runs sys.argv again, so it must not change; hence `args`.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return parser(
            MergeModule,
            Calibration,
            run=False,
            args=_with_public_paths(given),
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # only `model.optimizer` configures it
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "trainmerge fit",
                "exit_on_error": False,
                "parser_mode": TEMPLATES,
                "allow_abbrev": False,
            },
        )


def _with_public_paths(given: list[str] | dict[str, Any]) -> list[str] | dict[str, Any]:
    """The same with public class paths in every word, `--key=value` or content."""
    if isinstance(given, dict):
        return dict(public_paths(given))
    parts = [word.rpartition("=") for word in given]
    return [f"{key}{equals}{public_path(value)}" for key, equals, value in parts]
