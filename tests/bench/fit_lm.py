"""A fit on SmolLM2-135M with three full experts, beside a loop of live teachers that merges in autograd.

Both do the same work: 40 steps on one of 10 examples of 256 tokens an expert, in bfloat16, with one thread.
CPU seconds count, because wall time on a shared machine means little; memory is anonymous memory above the
start, as in `fit_memory`, in runs of their own: what keeps the allocator honest makes it slow.
`plain` is what neither can save: forward and backward passes of an ordinary model on the same examples.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import figure
from trainmerge.system.memory import Peak

CONFIG = "configs/expert-merging-fast.yaml"
EXAMPLES, LENGTH, STEPS = 10, 256, 40


def ours(steps: int) -> dict[str, float]:
    """`tm.fit` as configured, without the command line."""
    import torch

    import trainmerge as tm
    from trainmerge.run.recipe_files import calibration_files

    recipe = _recipe()
    with tempfile.TemporaryDirectory() as run, Peak() as peak:
        start = time.process_time()
        module = tm.MergeModule(
            recipe,
            tm.Alignment(),
            optimizer=lambda c: torch.optim.Adam(c, lr=0.05),
            weights="bfloat16",
            tasks_per_backward=3,
            workspace=f"{run}/workspace",
        )
        data = tm.Calibration(
            calibration_files(recipe), recipe.base, batch_size=1, max_length=LENGTH, max_examples=EXAMPLES
        )
        trainer = tm.make_trainer(run, max_steps=steps, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, data, trainer, run)
        seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": peak.grown}


def live(steps: int) -> dict[str, float]:
    """The obvious loop: experts in memory as teachers, every example merges through autograd."""
    import torch
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    recipe, inputs_of = _recipe(), _inputs()
    with Peak() as peak:
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
        start = time.process_time()  # loading is not counted here; it is in ours, and recording too
        for step in range(steps):
            optimizer.zero_grad()
            for k, teacher in enumerate(teachers):
                inputs = inputs_of[k][step % EXAMPLES]
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
    return {"seconds": seconds, "bytes": peak.grown}


def plain(steps: int) -> dict[str, float]:
    """Forward and backward of the base in bfloat16, and nothing else."""
    import torch
    from transformers import AutoModelForCausalLM

    recipe, inputs_of = _recipe(), _inputs()
    model = AutoModelForCausalLM.from_pretrained(recipe.base, dtype=torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)  # no expert changed them
    with Peak() as peak:
        start = time.process_time()
        for step in range(steps):
            for own in inputs_of:
                logits = model(**own[step % EXAMPLES], use_cache=False).logits
                logits.backward(torch.full_like(logits, 1e-4))
                model.zero_grad()
        seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": peak.grown}


def _inputs():
    """Model inputs, [expert][example]."""
    from trainmerge.data.text_files import load_examples
    from trainmerge.data.tokenizer import Tokenizer

    recipe = _recipe()
    tokenize = Tokenizer(recipe.base, LENGTH)
    texts = [load_examples(str(e.calibration), ["text"])["text"][:EXAMPLES] for e in recipe.experts.values()]
    return [[tokenize([text]) for text in own] for own in texts]


def _recipe():
    from trainmerge.run.config import read_config
    from trainmerge.run.recipe import Recipe

    return read_config(Recipe, "recipe", Path(CONFIG))


def measured(what: str, steps: int, honest: bool = False) -> dict[str, float]:
    """The figures of one process; with an allocator that gives back what is free at once, if `honest`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if honest:
        environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "tests.bench.fit_lm", what, str(steps)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """One process each."""
    model = sum(file.stat().st_size for file in Path(_recipe().base).glob("*.safetensors"))  # float32
    small = {what: measured(what, 2, honest=True)["bytes"] for what in ("ours", "live")}
    figure("fit_lm_peak_over_model", small["ours"] / model, "ratio", "3")
    figure("live_teacher_memory_ratio", small["live"] / small["ours"], "ratio", "2")
    ours_seconds = measured("ours", STEPS)["seconds"]
    # every step of these is as long as another: a quarter of them is enough to know
    live_seconds, plain_seconds = (4 * measured(what, STEPS // 4)["seconds"] for what in ("live", "plain"))
    figure("fit_lm_cpu_seconds", ours_seconds, "s", "1200")
    figure("live_teacher_time_ratio", live_seconds / ours_seconds, "ratio", "2")
    figure("live_teacher_time_limit", live_seconds / plain_seconds, "ratio", "")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [what, steps]:
            print(json.dumps({"ours": ours, "live": live, "plain": plain}[what](int(steps))))
        case _:
            main()
