"""Peak memory of a fit for K = 2, 4, 8: one model, one gradient and activations, whatever K is.

What is counted is anonymous memory (RssAnon), sampled every two milliseconds: mapped files are the page
cache's, which the kernel takes back when it wants.
"""

import os
import subprocess
import sys
import tempfile

from tests.bench.__main__ import figure
from tests.bench.suite_model import many_experts
from trainmerge.system.memory import Peak

BATCH, STEPS, MAX_LENGTH = 4, 3, 64


def fit_peak(experts: int) -> None:
    """Print by how much a fit grows a process that has built everything but the model."""
    import trainmerge as tm
    from trainmerge.run.recipe_files import calibration_files

    with many_experts(experts) as recipe, tempfile.TemporaryDirectory() as run:
        module = tm.MergeModule(recipe, workspace=f"{run}/workspace")
        data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=BATCH, max_length=MAX_LENGTH)
        trainer = tm.make_trainer(run, max_steps=STEPS, accelerator="cpu", enable_progress_bar=False)
        with Peak() as fit:
            tm.fit(module, data, trainer, run)
    print(fit.grown)


def budget() -> None:
    """Print what a fit may hold, in bytes: one model, and what one task's forward and backward need.

    Each gradient of that plain pass is dropped as soon as it is complete, so it holds one at a time.
    """
    import trainmerge as tm
    from trainmerge.checkpoints import load_model
    from trainmerge.model.media_forward import backbone
    from trainmerge.run.recipe_files import calibration_files

    with many_experts(1) as recipe:
        opened = recipe.open()
        module = load_model(opened.base).module
        data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=BATCH, max_length=MAX_LENGTH)
        inputs = data.tokenize(["word " * MAX_LENGTH] * BATCH)
        parameters = dict(module.named_parameters())
        for name in opened.layout.groups:
            parameters[name].requires_grad_(True)
            parameters[name].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Peak() as working:
            backbone(module)(**inputs).last_hidden_state.square().mean().backward()
    print(sum(parameter.nbytes for parameter in parameters.values()) + working.grown)


def measured(*arguments: str) -> int:
    """The number that a process of this file prints last."""
    command = [sys.executable, "-m", "tests.bench.fit_memory", *arguments]
    # One arena that gives memory back at once: what is counted is what is held, not what malloc keeps.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """A process a K."""
    allowed = measured("budget")
    peaks = {experts: measured(str(experts)) for experts in (2, 4, 8)}
    figure("fit_budget", allowed / 2**20, "MiB", "")
    for experts, peak in peaks.items():
        figure(f"fit_peak_K{experts}", peak / 2**20, "MiB", "")
        figure(f"fit_peak_over_budget_K{experts}", peak / allowed, "ratio", "1.15")
    figure("fit_peak_ratio_K8_over_K2", peaks[8] / peaks[2], "ratio", "flat")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["budget"]:
            budget()
        case [experts]:
            fit_peak(int(experts))
        case _:
            main()
