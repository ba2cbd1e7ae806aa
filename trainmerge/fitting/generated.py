"""Before a fit: experts write the calibration texts that no file gives, each once, into the workspace."""

import json
import shutil
from pathlib import Path

from trainmerge.data.calibration import Calibration, recorded_tokenizer
from trainmerge.data.generate import Generate
from trainmerge.model.resident import Resident
from trainmerge.model.written_texts import Writer
from trainmerge.run.opened import Opened
from trainmerge.system import distributed
from trainmerge.system.atomic import replacing, write_whole
from trainmerge.system.workspace import digest

FILES = "generated-"  # begins the names of their files


def write_generated(data: Calibration, opened: Opened, resident: Resident, workspace: Path) -> None:
    """Fill the data with the texts that its experts write, read from `workspace` if they are there.

    The resident model becomes each expert in turn.

    Raises:
        ValueError: an expert writes blank texts.
    """
    for name, wanted in [*data.unwritten.items()]:
        path = generated_file(data, name, wanted, opened, workspace)
        with distributed.rank_zero_first():
            if not path.exists():
                _write(data, name, wanted, resident, path)
        data.fill(name, str(path))


def generated_file(data: Calibration, name: str, wanted: Generate, opened: Opened, workspace: Path) -> Path:
    """The file of an expert's own texts: its name has the digest of what they depend on."""
    depends_on = [
        opened.identity(), name, wanted.identity(), recorded_tokenizer(data.tokenizer), data.max_length,
        data.columns.record(), data.seed,
    ]  # fmt: skip
    return workspace / f"{FILES}{name}-{digest(repr(depends_on))}.jsonl"


def _write(data: Calibration, name: str, wanted: Generate, resident: Resident, path: Path) -> None:
    print(f"{name} writes {wanted}", flush=True)
    k = [*data.files].index(name)
    with resident.merged.teacher(k) as module:
        rows = Writer(module, data.tokenize, wanted, data.columns, f"{data.seed} {name}").rows()
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def share_generated(source: Path, target: Path) -> None:
    """Copy the texts that experts wrote in one workspace to another."""
    for file in source.glob(f"{FILES}*.jsonl"):
        with replacing(target / file.name) as new:
            shutil.copyfile(file, new)
