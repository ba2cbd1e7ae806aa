"""`make cases CASES=FOLDER`: run each script of a folder of small inputs, and say what it answers.

A script passes if every line of its output that begins with PASS or FAIL says PASS; one without such a line
gives a figure, its last line. A script that ends in our ValueError was refused, which is an answer too; any
other error is a crash. Scripts may name modules as they were in version 0.1.0.

    python -m tests.cases FOLDER [part of a path ...]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for one script
LIBRARIES = {"common.py", "fam.py", "tok.py"}  # that the other scripts import
WORDS = {  # of scripts that take some
    "bug_misc.py": "scaler combine anchor plateau",
    "grad.py": "gpt2 bert mamba",
    "pre.py": "gpt2 bert-mlm",
    "kill_fit.py": "timed 20 0",
    "fuzz_files.py": "300 0",
    "fuzz_pickle.py": "100 0",
    "fuzz_texts.py": "100 0",
}
MOVED = {  # name in a script's import -> the module that has it now
    "Batch": "data.batch", "Outputs": "data.batch", "Steps": "data.calibration", "Columns": "data.columns",
    "read_examples": "data.examples", "Tokenizer": "data.tokenizer", "Delta": "task_vectors.delta",
    "ExpertWeight": "kernels.terms", "MappedFile": "system.safetensors_file",
    "write_safetensors": "system.safetensors_file", "RunFolder": "run.folder",
    "calibration_files": "run.recipe_files", "apply": "preprocess.cache",
    "combined": "coefficients.aggregation",
    "load_coefficients": "coefficients.coefficients", "load_model": "checkpoints.model",
    "load_snapshot": "fitting.provenance", "merged_weights": "model.functional",
    "open_checkpoint": "checkpoints.reader", "PickleFile": "checkpoints.reader",
    "recompute_blocks": "model.activation_checkpointing", "reopen": "fitting.reopen",
    "rounds": "plan.micro_batches", "Economy": "plan.micro_batches",
}  # fmt: skip
MODULES = {
    "trainmerge.forward": "trainmerge.model.forward",
    "trainmerge.reopen": "trainmerge.fitting.reopen",
    "trainmerge.fit_cli": "trainmerge.cli.fit",
    "trainmerge.scoring": "trainmerge.evaluate.console",
    "trainmerge.allocation": "trainmerge.fitting.allocate_chunks",
    "trainmerge.tradeoff_cli": "trainmerge.cli.tradeoffs",
    "trainmerge.verify": "trainmerge.export.verify",
    "trainmerge.tradeoffs.run_search": "trainmerge.tradeoffs.search",
    "tests.test_informed": "tests.preprocess.test_informed",
}
GRADIENT = (  # a private method of 0.1.0, and what it did
    "mod._gradient_of(st)",
    "__import__('trainmerge.fitting.step_gradient').fitting.step_gradient.StepGradient("
    "mod.resident.merged, tuple(mod.recipe.experts), mod.loss, lambda loss: loss.backward(), "
    "lambda mean: mean, mod.schedule, mod.rule)(st, 0)",
)
CHANGED = (  # what a script expects of the card or needs on disk, and why another answer is right
    GRADIENT,
    (  # a base on this disk is named by no hub id, and a card has the task of its model
        'set(d) == {"base_model", "base_model_relation", "library_name", "tags"}',
        'set(d) == {"library_name", "pipeline_tag", "tags"}',
    ),
    (  # two tables: each has one number of columns
        'widths = {l.replace("\\\\|", "").count("|") for l in rows}',
        'widths = {max(len({l.replace("\\\\|", "").count("|") for l in part.splitlines() '
        'if l.startswith("|")}) for part in t.split("\\n\\n"))}; assert rows',
    ),
    ("len(widths) == 1 and not inj", "widths == {1} and not inj"),
    (  # the log of the script itself is no file that a command wrote
        'base = ROOT / "sec"; shutil.rmtree(base, ignore_errors=True); base.mkdir()',
        'base = ROOT / "sec"; shutil.rmtree(base, ignore_errors=True); base.mkdir(); '
        '(base / "log.txt").touch()',
    ),
    (  # models, which another script is to make first
        "root = W / n; row = []",
        "root = W / n; row = []; (root / 'base').exists() or setup(n, F[n], root)",
    ),
    (  # a run to mutate, which no script makes
        "cks = list(",
        "run(['fit', '--config', config(world(), ROOT / 'ref0.yaml', steps=4, save_every=2), "
        "'--run', ROOT / 'ref0'])\ncks = list(",
    ),
)
if find_spec("quadprog") is None:  # of pip install .[conflicts]
    CHANGED = (*CHANGED, ('("UPGrad",UPGrad()),', ""))
IMPORT = re.compile(r"from trainmerge(?:\.[\w.]+)? import (\w+(?: *, *\w+)*)")


def mended(text: str) -> str:
    """A script with today's modules in its imports, and today's card."""

    def names(found: re.Match[str]) -> str:
        parts = [name.strip() for name in found[1].split(",")]
        if not all(name in MOVED for name in parts):
            return found[0]
        was = {"Economy": "StepSchedule as Economy", "combined": "aggregate_gradients as combined"}
        return "; ".join(f"from trainmerge.{MOVED[name]} import {was.get(name, name)}" for name in parts)

    for old, new in MODULES.items():
        text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    text = IMPORT.sub(names, text)
    for old, new in CHANGED:
        text = text.replace(old, new)
    return text


def verdict(out: str, err: str, code: int) -> str:
    """The answer of a script that printed `out` and `err` and ended with `code`."""
    lines = [line for line in out.splitlines() if line.strip()]
    verdicts = [line for line in lines if re.match(r"(PASS|FAIL)\b", line)]
    failed = [line for line in verdicts if line.startswith("FAIL")]
    if failed and len(verdicts) > 1:
        return f"FAIL {len(failed)} of {len(verdicts)}: {failed[0].removeprefix('FAIL').strip(' :')}"
    if verdicts:
        return verdicts[-1]
    if not code:
        return lines[-1] if lines else ""
    errors = [line for line in err.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    error = (errors or err.strip().splitlines() or [f"exit code {code}"])[-1]
    return f"refused: {error}" if error.startswith("ValueError: ") else f"CRASH {error}"


def run(script: Path, place: Path) -> dict[str, object]:
    """The answer of one script, which may write to `place`, and its seconds."""
    words = WORDS.get(script.name, "").split()
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "TMPDIR": str(place), "CASES": str(place / "work"),
    }  # fmt: skip
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, str(script), *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
        answer = verdict(done.stdout, done.stderr, done.returncode)
    except subprocess.TimeoutExpired:
        answer = f"no answer in {LIMIT} s"
    return {"answer": answer.strip()[:200], "seconds": round(time.monotonic() - began)}


def main() -> int:
    """Run the scripts; 1 if one says FAIL or crashes."""
    parser = argparse.ArgumentParser(prog="python -m tests.cases", description="Run a folder of cases.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("only", nargs="*", help="parts of the scripts' paths")
    parser.add_argument("--keep", type=Path, help="write the answers to this JSON file too")
    chosen = parser.parse_args()
    answers = {}
    with tempfile.TemporaryDirectory(prefix="cases-") as place:
        (Path(place) / "work" / "w").mkdir(parents=True)
        scripts = Path(place) / "scripts"
        shutil.copytree(chosen.folder, scripts)
        for script in sorted(scripts.rglob("*.py")):
            script.chmod(0o644)
            script.write_text(mended(script.read_text()))
        for script in sorted(scripts.rglob("*.py")):
            name = str(script.relative_to(scripts))
            if script.name in LIBRARIES or (chosen.only and not any(part in name for part in chosen.only)):
                continue
            answers[name] = run(script, Path(place))
            print(f"{name:45} {answers[name]['seconds']:4} s  {answers[name]['answer']}", flush=True)
            if chosen.keep:
                chosen.keep.write_text(json.dumps(answers, indent=1) + "\n")
    failed = sum(
        str(found["answer"]).startswith(("FAIL", "CRASH", "no answer")) for found in answers.values()
    )
    print(f"{len(answers)} scripts, {failed} fail or crash")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
