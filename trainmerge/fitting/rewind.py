"""Take a run folder back to a step before a fit resumes there."""

from collections.abc import Iterable
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger

from trainmerge.fitting.loggers import move_table
from trainmerge.fitting.metrics_log import JsonLines
from trainmerge.run.folder import RunFolder
from trainmerge.run.trajectory import thin
from trainmerge.system.atomic import write_whole


def rewind(folder: RunFolder, step: int, shape: tuple[int, int], loggers: Iterable[Logger] = ()) -> None:
    """Remove everything that a run wrote after `step`; 0 removes all.

    Snapshots, the trajectory of coefficients [K, G] = `shape`, and log lines that would otherwise appear
    twice. Incomplete lines of a killed process are removed too.
    """
    folder.drop_snapshots_after(step)
    thin(folder.trajectory, step, shape)
    drop_incomplete(folder.usage)
    for logger in loggers:
        match logger:
            case JsonLines():
                logger.keep_until(step)
            case CSVLogger():
                move_table(logger, step)


def drop_incomplete(log: Path) -> None:
    """Remove an incomplete last line, which a killed process left: the next line would be appended to it."""
    text = log.read_bytes() if log.exists() else b""
    if text and not text.endswith(b"\n"):
        whole = text[: text.rfind(b"\n") + 1]
        write_whole(log, whole.decode("utf-8", errors="replace"))
