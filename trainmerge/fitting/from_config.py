"""A configuration -> module, data and trainer, for a fit, its plan or a search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.fit_parser import FitCLI, load_yaml, parse
from trainmerge.fitting.module import MergeModule
from trainmerge.run.config import read_settings
from trainmerge.run.sections import check_sections
from trainmerge.run.trust import files_checked


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
    content = load_yaml(Path(config).read_text(encoding="utf-8"))
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


def build_settings(given: list[str] | dict[str, Any], parser: type[FitCLI] = FitCLI) -> FitSettings:
    """Parse words of a command line, or a configuration's content, and build module, data and trainer.

    Raises:
        ValueError: they are invalid.
    """
    try:
        cli = parse(given, parser)
    except ArgumentError as error:
        raise ValueError(error) from error
    except MisconfigurationException as error:  # Lightning's error for incompatible settings
        raise ValueError(error) from error
    text = cli.parser.dump(cli.config, skip_validation=True)
    assert isinstance(cli.model, MergeModule)
    assert isinstance(cli.datamodule, Calibration)
    options = {name: cli.config[name] for name in ("resume", "memory", "report", "dry_run")}
    return FitSettings(cli.model, cli.datamodule, cli.trainer, Path(cli.config["run"]), **options, text=text)
