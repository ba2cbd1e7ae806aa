"""The files of the calibration texts that experts wrote themselves, in a run's workspace."""

from pathlib import Path

from trainmerge.data.calibration import Calibration, recorded_tokenizer
from trainmerge.data.generate import Generate
from trainmerge.run.opened import Opened
from trainmerge.system.workspace import digest

GENERATED = "generated-"  # begins the names of their files
WRITTEN = "generated"  # in the manifest: expert -> SHA-256 of its file


def generated_file(data: Calibration, name: str, wanted: Generate, opened: Opened, workspace: Path) -> Path:
    """The file of an expert's own texts: its name has the digest of what they depend on."""
    depends_on = [
        opened.identity(), name, wanted.identity(), recorded_tokenizer(data.tokenizer), data.max_length,
        data.columns.record(), data.seed,
    ]  # fmt: skip
    return workspace / f"{GENERATED}{name}-{digest(repr(depends_on))}.jsonl"


def read_generated(data: Calibration, opened: Opened, workspace: Path) -> None:
    """Fill the data with the texts that its experts wrote in an earlier fit.

    Raises:
        ValueError: an expert's texts are not in the workspace.
    """
    for name, wanted in [*data.unwritten.items()]:
        path = generated_file(data, name, wanted, opened, workspace)
        if not path.exists():
            raise ValueError(f"{path}: the texts that {name} wrote are lost: run the fit again")
        data.fill(name, str(path))
