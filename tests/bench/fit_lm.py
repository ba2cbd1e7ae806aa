"""A fit on SmolLM2-135M with three full experts, beside a loop of live teachers that merges in autograd.

Both do the same work: 10 examples of 256 tokens an expert, each seen `PASSES` times, bf16-mixed, one thread.
CPU seconds count, because wall time on a shared machine means little; memory is anonymous memory above the
start, as in `fit_memory`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import figure
from tests.bench.fit_memory import Peak

CONFIG = "configs/expert-merging-fast.yaml"
EXAMPLES, LENGTH, PASSES = 10, 256, 1


def ours() -> dict[str, float]:
    """`tm.fit` as configured, without the command line."""
    import torch

    import trainmerge as tm
    from trainmerge.recipe import calibration_files

    recipe = _recipe()
    with tempfile.TemporaryDirectory() as run, Peak() as peak:
        start = time.process_time()
        module = tm.MergeModule(
            recipe,
            tm.Alignment(),
            optimizer=lambda c: torch.optim.Adam(c, lr=0.05),
            weights="bfloat16",
            tasks_per_backward=int(os.environ.get("TPB", "3")),
            workspace=f"{run}/workspace",
        )
        data = tm.Calibration(
            calibration_files(recipe), recipe.base, batch_size=1, max_length=LENGTH, max_examples=EXAMPLES
        )
        trainer = tm.make_trainer(
            run,
            max_steps=EXAMPLES * PASSES,
            accelerator="cpu",
            precision="32-true",
            enable_progress_bar=False,
        )
        tm.fit(module, data, trainer, run)
        seconds = time.process_time() - start
    loaded = sum(p.nbytes for p in module.resident.merged.module.parameters())
    return {"seconds": seconds, "bytes": peak.grown, "model": loaded}


def live() -> dict[str, float]:
    """The obvious loop: experts in memory as teachers, every example merges through autograd."""
    import torch
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    from trainmerge.examples import load_examples
    from trainmerge.tokenizer import Tokenizer

    recipe = _recipe()
    tokenize = Tokenizer(recipe.base, LENGTH)
    texts = [
        list(load_examples(str(e.calibration), ["text"])["text"][:EXAMPLES]) for e in recipe.experts.values()
    ]
    with Peak() as peak:
        start = time.process_time()
        base = AutoModelForCausalLM.from_pretrained(recipe.base).requires_grad_(False)
        teachers = [
            AutoModelForCausalLM.from_pretrained(e.path).requires_grad_(False)
            for e in recipe.experts.values()
        ]
        weights = dict(base.named_parameters())
        taus = [
            {
                name: p - weights[name]
                for name, p in teacher.named_parameters()
                if not torch.equal(p, weights[name])
            }
            for teacher in teachers
        ]
        names = [name for name in weights if name in taus[0]]
        c = torch.full((len(taus), len(names)), 0.3, requires_grad=True)
        optimizer = torch.optim.Adam([c], lr=0.05)
        for step in range(EXAMPLES * PASSES):
            optimizer.zero_grad()
            for k, teacher in enumerate(teachers):
                inputs = tokenize([texts[k][step % EXAMPLES]])
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    wanted = teacher(**inputs).logits.float().softmax(-1)
                merged = {
                    name: weights[name] + sum(c[j, i] * tau[name] for j, tau in enumerate(taus))
                    for i, name in enumerate(names)
                }
                with torch.autocast("cpu", torch.bfloat16):
                    logits = functional_call(base, merged, (), inputs).logits.float()
                loss = (wanted * (wanted.log() - logits.log_softmax(-1))).nan_to_num().sum(-1).mean()
                loss.backward()
            optimizer.step()
        seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": peak.grown, "model": sum(p.nbytes for p in weights.values())}


def _recipe():
    from trainmerge.config import read_config
    from trainmerge.recipe import Recipe

    return read_config(Recipe, "recipe", Path(CONFIG))


def measured(what: str) -> dict[str, float]:
    """The figures of one process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-m", "tests.bench.fit_lm", what]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """One process each."""
    mine, theirs = measured("ours"), measured("live")
    figure("fit_lm_cpu_seconds_a_step", mine["seconds"] / (EXAMPLES * PASSES), "s", "")
    figure("fit_lm_peak_over_model", mine["bytes"] / mine["model"], "ratio", "3")
    figure("live_teacher_time_ratio", theirs["seconds"] / mine["seconds"], "ratio", "2")
    figure("live_teacher_memory_ratio", theirs["bytes"] / mine["bytes"], "ratio", "2")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours"]:
            print(json.dumps(ours()))
        case ["live"]:
            print(json.dumps(live()))
        case _:
            main()
