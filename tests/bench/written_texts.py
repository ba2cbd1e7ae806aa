"""How much of the gap texts close that the models write themselves: SmolLM2's three experts of the suite.

Alignment on real calibration texts and on as many that each expert wrote (`calibration: {generate: N}`); and
the reverse KL on real texts beside on-policy learning on prompts of them, at as many passes: a forward is one
pass of a text, a backward two; on policy, writing and judging a round's texts are one each. Scores are
perplexities of other documents, the gap is that between base and experts in logs of the geometric means.
"""

import copy
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.bench.__main__ import figure
from tests.lm_suite import closed

CONFIG = Path("configs/expert-merging-fast.yaml")
EXAMPLES, TOKENS, STEPS, DOCUMENTS = 10, 128, 40, 12
PROMPT, ROUND = 32, 10
PASSES = STEPS * 3 + STEPS // ROUND * 2 * EXAMPLES  # of one expert's texts, on policy
OFF_POLICY_STEPS = round((PASSES - EXAMPLES) / 3)  # the record is one pass of each text
REVERSE: dict[str, Any] = {"class_path": "trainmerge.JensenShannon", "init_args": {"beta": 1.0}}


def settings() -> dict[str, dict[str, Any]]:
    """Row -> its configuration."""
    real = yaml.safe_load(CONFIG.read_text())
    real["data"] |= {"max_examples": EXAMPLES, "max_length": TOKENS}
    real |= {"seed_everything": 0, "report": False}
    real["trainer"] |= {"max_steps": STEPS, "enable_progress_bar": False}
    del real["model"]["lr_scheduler"]  # made for 40 steps, and off-policy rows have others
    generated, begun, reverse, on_policy = (copy.deepcopy(real) for _ in range(4))
    generated["recipe"]["each"]["calibration"] = {"generate": EXAMPLES, "length": TOKENS}
    begun["recipe"]["each"]["calibration"] = {
        "generate": EXAMPLES, "length": TOKENS, "prefixes": "{prefixes}/{{name}}.txt"
    }  # fmt: skip
    reverse["model"]["objective"] = on_policy["model"]["objective"] = REVERSE
    reverse["trainer"]["max_steps"] = OFF_POLICY_STEPS
    on_policy["model"]["on_policy"] = {"every": ROUND, "prompt": PROMPT, "length": TOKENS - PROMPT}
    return {
        "real": real, "generated": generated, "generated_from_beginnings": begun, "off_policy": reverse,
        "on_policy": on_policy,
    }  # fmt: skip


def beginnings(folder: Path, recipe: dict[str, Any]) -> None:
    """The first three words of each domain's real texts, a file each."""
    for name in recipe["experts"]:
        file = Path(recipe["each"]["calibration"].format(name=name))
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()[:EXAMPLES]]
        (folder / f"{name}.txt").write_text("".join(" ".join(text.split()[:3]) + "\n" for text in texts))


def command(*words: str) -> float:
    """Run a command of ours; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "trainmerge.cli", *words], check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Learn and score every row; base and experts once."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, baselines = Path(temporary), dict[str, Any]()
        for row, content in settings().items():
            config, run = folder / f"{row}.yaml", folder / row
            beginnings(folder, yaml.safe_load(CONFIG.read_text())["recipe"])
            config.write_text(
                yaml.safe_dump(content, sort_keys=False)
                .replace("{prefixes}", str(folder))
                .replace("{{name}}", "{name}")
            )
            seconds = command("fit", str(config), str(run))
            command(
                "evaluate", str(run), "--limit", str(DOCUMENTS), *(() if row == "real" else ["--no-compare"])
            )
            scores = json.loads((run / "scores.json").read_text())
            baselines = baselines or scores
            found[row] = closed(scores["learned"], baselines)
            figure(f"written_seconds_{row}", seconds, "CPU seconds", "")
            figure(f"written_closed_{row}", found[row], "share of the gap", "")
        best = max(name for name in baselines if name.startswith("task arithmetic"))
        figure("written_closed_uniform", closed(baselines[best], baselines), "share of the gap", "")
    figure("written_generated_over_real", found["generated"] / found["real"], "ratio", ">= 0.8")
    figure("written_on_over_off_policy", found["on_policy"] / found["off_policy"], "ratio", "")


if __name__ == "__main__":
    main()
