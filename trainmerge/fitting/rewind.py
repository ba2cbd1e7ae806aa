"""Takes a run folder back to a step, before a fit goes on from there."""

from collections.abc import Iterable

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger

from trainmerge.fitting.loggers import move_table
from trainmerge.fitting.metrics_log import JsonLines
from trainmerge.run.folder import RunFolder
from trainmerge.run.trajectory import thin


def rewind(folder: RunFolder, step: int, shape: tuple[int, int], loggers: Iterable[Logger] = ()) -> None:
    """Drop what a run left of the steps after `step`, which it will make again; 0 begins anew.

    Snapshots, the trajectory of coefficients [K, G] = `shape`, and the tables of those loggers that would
    have a step twice. Lines that a killed process left half written go too.
    """
    folder.drop_snapshots_after(step)
    thin(folder.trajectory, step, shape)
    for logger in loggers:
        match logger:
            case JsonLines():
                logger.keep_until(step)
            case CSVLogger():
                move_table(logger, step)
