"""`trainmerge fit`: LightningCLI over the recipe, the module and the data, in a fixed run folder."""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException

from trainmerge.fitting.fit import fit, precision_of
from trainmerge.fitting.from_config import FitCLI, parse
from trainmerge.fitting.plan_fit import plan_fit
from trainmerge.fitting.snapshots import EXIT_PREEMPTED, Preempted
from trainmerge.plan.plan import Plan
from trainmerge.plan.plan_model import print_plan
from trainmerge.run.folder import RunFolder


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
