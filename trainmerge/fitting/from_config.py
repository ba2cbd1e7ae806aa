"""A configuration -> module, data and trainer, for a fit, its plan or a search."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.mistakes import explain
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


def _load(text: str) -> Any:
    """The parser's YAML with `recipe.each` filled in and public class paths."""
    return public_paths(expand(get_loader("yaml")(text)))


set_loader(TEMPLATES, _load, (yaml.YAMLError,))


@dataclass(frozen=True)
class FitSettings:
    """The inputs of a fit.

    Args:
        module: The merge to learn.
        data: The calibration data.
        trainer: Lightning's, which writes into the run folder.
        run: The run folder.
        resume: auto, never, or a checkpoint's path.
        memory: The fit's memory limit, such as `8GiB`.
        report: Whether to write a report at the end.
        dry_run: Whether to print only the plan.
        text: The configuration with every key, as YAML.
    """

    module: MergeModule
    data: Calibration
    trainer: pl.Trainer
    run: Path
    resume: str
    memory: str | None
    report: bool
    dry_run: bool
    text: str


def from_config(config: str | Path, run: str | Path, changes: Mapping[str, Any] | None = None) -> FitSettings:
    """Module, data and trainer of a configuration file; headers are checked, no weight is read.

    Args:
        config: A YAML file of `trainmerge fit`.
        run: The run folder; nothing is written there yet.
        changes: Key -> value that replaces the file's: `{"trainer.max_steps": 0}`.

    Raises:
        ValueError: the file, or a file that it names, is invalid.
    """
    read_settings(Path(config))  # its errors name the file and the line
    content = _load(Path(config).read_text(encoding="utf-8"))
    for key, value in {**(changes or {}), "run": str(run)}.items():
        content = _changed(content, key.split("."), value)
    check_sections(content)
    with files_checked({Path(config): content}):
        return build_settings(content)


def _changed(content: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """The nested mapping with one value replaced."""
    own = content if isinstance(content, Mapping) else {}
    first, *rest = keys
    return {**own, first: _changed(own.get(first), rest, value) if rest else value}


def build_settings(given: list[str] | dict[str, Any], parser: "type[FitCLI] | None" = None) -> FitSettings:
    """Parse words of a command line, or a configuration's content, and build module, data and trainer.

    Raises:
        ValueError: they are invalid.
    """
    try:
        cli = _parse(given, parser or FitCLI)
    except ArgumentError as error:
        raise ValueError(error) from error
    except MisconfigurationException as error:  # Lightning's error for incompatible settings
        raise ValueError(error) from error
    text = cli.parser.dump(cli.config, skip_validation=True)
    assert isinstance(cli.model, MergeModule)
    assert isinstance(cli.datamodule, Calibration)
    options = {name: cli.config[name] for name in ("resume", "memory", "report", "dry_run")}
    return FitSettings(cli.model, cli.datamodule, cli.trainer, Path(cli.config["run"]), **options, text=text)


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
                raise ValueError(explain(str(error), known, files, list(options))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer of `trainer.make_trainer`, with the configuration's arguments."""
        arguments = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return make_trainer(self.config["run"], self.config["save_every"], **arguments)


def _tokenizer(module: MergeModule) -> str:
    return module.recipe.tokenizer_folder(module.settings.workspace)


def _parse(given: list[str] | dict[str, Any], parser: type[FitCLI]) -> FitCLI:
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
