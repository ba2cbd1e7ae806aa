"""Every family of models from files to files, as a user would go: the second half of `make families`.

A random base, two full experts and an adapter of each family are inspected, merged without a step, and fitted
for two steps and exported. `merge` is the largest relative error of the exported tensors, against float64
arithmetic on the files; the export must load with nothing missing. `fit` has three experts and ends with
`export --verify`. What is refused comes with the words of the refusal; any other end is a CRASH.

    python -m tests.family_table                the whole table, kept in tests/results/families.json
    python -m tests.family_table --only Mamba   families whose name contains this: their rows are replaced
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers.utils import logging

from tests.family_world import Columns, write_family
from tests.model_families import FAMILIES, Family
from tests.results import FOLDER
from tests.task_families import TASK_FAMILIES
from trainmerge.checkpoints.output import output_of
from trainmerge.checkpoints.reader import open_checkpoint
from trainmerge.cli import main as command
from trainmerge.system.atomic import write_whole

LIMIT = 1e-5  # of a merged tensor's relative error; float32 stores 6e-8
SHARES = {"a": 0.3, "b": 0.6}
CRASH = "CRASH"
LONGEST = 260  # characters of a reason


def walk(family: Family, root: Path) -> dict[str, str]:
    """What each step of one family's way says."""
    experts, columns = write_family(family, root)
    found = {"inspect": "", "merge": "", "fit": "", "reason": ""}
    _write_config(root / "plain.yaml", root, list(SHARES), columns, steps=0)
    _write_config(root / "learned.yaml", root, experts, columns, steps=2)
    found["inspect"], words = _call("inspect", root / "learned.yaml")
    found["merge"], merged = _merge(family, root)
    found["fit"], learned = _calls(
        ("fit", root / "learned.yaml", root / "run", "--no-report"),
        ("export", root / "run", root / "out", "--verify"),
    )
    found["reason"] = next((one for one in (merged, learned, words) if one), "")
    return found


def _merge(family: Family, root: Path) -> tuple[str, str]:
    """The error of a merge without steps, and the reason if it is refused."""
    answer, reason = _calls(
        ("fit", root / "plain.yaml", root / "run0", "--no-report"), ("export", root / "run0", root / "out0")
    )
    if answer != "yes":
        return answer, reason
    error = relative_error(root)
    kind = getattr(transformers, family.kind)
    _, info = kind.from_pretrained(root / "out0", output_loading_info=True)
    lost = {key: names for key, names in info.items() if names and key.endswith("_keys")}
    right = error <= LIMIT and not lost
    return (f"{error:.0e}" if right else "WRONG"), ("" if right else f"error {error:.1e}, {lost}")


def relative_error(root: Path) -> float:
    """The largest relative error of an exported tensor against base + sum_k c_k tau_k in float64.

    Tensors that no expert has, or that the run does not merge, must be the base's.
    """
    base, out = _tensors(root / "base"), _tensors(root / "out0")
    experts = {name: _tensors(root / name) for name in SHARES}
    assert base.keys() == out.keys()
    worst = 0.0
    for name, own in base.items():
        if not own.is_floating_point():
            continue
        want = own.double()
        for expert, share in SHARES.items():
            want = want + share * (experts[expert].get(name, own).double() - own.double())
        worst = max(worst, float((out[name].double() - want).abs().max() / want.abs().max().clamp_min(1e-9)))
    return worst


def _tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def _write_config(path: Path, root: Path, experts: Sequence[str], columns: Columns, steps: int) -> None:
    """A configuration: without steps the experts' shares, else alignment."""
    told = {
        name: {"path": str(root / name), **({"calibration": str(root / f"{name}.jsonl")} if steps else {})}
        for name in experts
    }
    content: dict[str, Any] = {
        "recipe": {
            "base": str(root / "base"),
            "experts": told,
            "grouping": {"granularity": "tensor" if steps else "task"},
        },
        "model": {
            "objective": {"class_path": "trainmerge.Alignment", "init_args": _aligned(root)},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}},
            "initial": 0.3 if steps else list(SHARES.values()),
        },
        "data": {"batch_size": 2, "max_length": 32, "columns": columns},
        "trainer": {"max_steps": steps, "accelerator": "cpu", "enable_progress_bar": False},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def _aligned(root: Path) -> dict[str, float]:
    """Alignment of the logits, or of the hidden states of a base without any."""
    return {} if output_of(root / "base").logits else {"logits": 0.0, "hidden": 1.0}


def _calls(*commands: Sequence[object]) -> tuple[str, str]:
    """`yes` if all end well; else how the first of the others ended."""
    for words in commands:
        answer, reason = _call(*words)
        if answer != "yes":
            return answer, reason
    return "yes", ""


def _call(*words: object) -> tuple[str, str]:
    """`yes`, `refused` or CRASH, and the reason."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = command([str(word) for word in words])
        except Exception:
            return CRASH, traceback.format_exc().strip().splitlines()[-1][:LONGEST]
    lines = [line.strip() for line in errors.getvalue().splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith(("error", "  "))), lines[-1] if lines else "")
    return ("yes", "") if not code else ("refused", told)


def main() -> None:
    """Print a line for each family; keep the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.family_table")
    parser.add_argument("--only", default="", help="families whose name contains this")
    only = parser.parse_args().only
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = {}
    for name, family in (FAMILIES | TASK_FAMILIES).items():
        if only.lower() not in name.lower():
            continue
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            try:
                row = walk(family, root)
            except Exception:
                row = {"inspect": "", "merge": CRASH, "fit": "", "reason": traceback.format_exc()[-LONGEST:]}
            rows[name] = {key: value.replace(place, "")[:LONGEST] for key, value in row.items()}
        print(
            f"{name:24}",
            *(f"{rows[name][key]:8}" for key in ("inspect", "merge", "fit")),
            rows[name]["reason"],
        )
    file = FOLDER / "families.json"
    known = json.loads(file.read_text()) if only else {}
    write_whole(file, json.dumps(known | rows, indent=1) + "\n")
    if bad := [name for name, row in rows.items() if {CRASH, "WRONG"} & set(row.values())]:
        sys.exit(f"crashed or wrong: {', '.join(bad)}")


if __name__ == "__main__":
    main()
