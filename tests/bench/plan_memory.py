"""A fit of a 150M Llama with three experts: its peak over what it must hold, and over what its plan says.

What it must hold is one model and one plain forward and backward with the same loss, each gradient dropped as
soon as it is complete. Memory is counted as in `fit_memory`; two examples of 256 tokens an expert.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.__main__ import figure

EXPERTS, BATCH, TOKENS, STEPS = 3, 2, 256, 2


def write(folder: Path) -> None:
    """Base and experts, in float32."""
    from transformers import LlamaConfig

    from tests.bench.random_model import write_family

    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=14,
        num_attention_heads=12, dtype="float32", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_family(folder, config, EXPERTS, TOKENS)


def fitted(folder: Path) -> dict[str, int]:
    """By how much the process grows in a fit, and by how much its plan says."""
    import trainmerge as tm
    from trainmerge.run.recipe_files import calibration_files
    from trainmerge.system.memory import Peak

    texts = str(folder / "texts.jsonl")
    experts = {f"e{k}": tm.Expert(str(folder / f"e{k}"), texts) for k in range(1, EXPERTS + 1)}
    recipe = tm.Recipe(str(folder / "base"), experts)
    module = tm.MergeModule(recipe, workspace=str(folder / "run" / "workspace"))
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=BATCH, max_length=TOKENS)
    trainer = tm.make_trainer(folder / "run", max_steps=STEPS, accelerator="cpu", enable_progress_bar=False)
    plan = tm.plan_fit(module, data)
    with Peak() as peak:
        tm.fit(module, data, trainer, folder / "run")
    return {"grown": peak.grown, "planned": plan.total - plan.before}


def bare(folder: Path) -> dict[str, int]:
    """One model, and what a plain forward and backward grow by."""
    import torch

    from trainmerge.checkpoints import load_model, open_checkpoint
    from trainmerge.data.tokenizer import Tokenizer
    from trainmerge.objectives.entropy import entropy
    from trainmerge.system.memory import Peak

    module = load_model(open_checkpoint(folder / "base")).module
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    inputs = Tokenizer(str(folder / "base"), TOKENS)(texts[:BATCH])
    for parameter in module.parameters():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Peak() as peak:
        loss: torch.Tensor = entropy(module(**inputs).logits).mean()
        loss.backward()
    return {"grown": sum(p.nbytes for p in module.parameters()) + peak.grown}


def measured(what: str, place: str) -> dict[str, int]:
    """The figures of one process, whose allocator gives back what is free at once."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "tests.bench.plan_memory", what, place]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Write the checkpoints, then a process each."""
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        allowed, fit = measured("bare", place), measured("fitted", place)
        figure("llama150_fit_peak_over_budget", fit["grown"] / allowed["grown"], "ratio", "1.15")
        figure("llama150_plan_over_measured", fit["planned"] / fit["grown"], "ratio", "1 to 1.25")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [what, place]:
            print(json.dumps({"fitted": fitted, "bare": bare}[what](Path(place))))
        case _:
            main()
