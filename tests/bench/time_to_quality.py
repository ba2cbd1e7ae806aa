"""CPU seconds until a merge is as good as 500 AdaMerging steps, and until it has 95% of the final gap.

The demo's five experts. AdaMerging as published (entropy, 0.3, Adam at 0.001, one coefficient per tensor) but
for `BATCH` texts per task and step instead of 16, so that it ends; a plain autograd loop of the same steps is
timed beside it. Ours: the demo's guarded entropy from two starts, with three optimizers. Seconds are those of
the process from the loading of the base on, recording and measuring of the experts included, scoring not.
Quality is the mean accuracy on the first `TEXTS` test texts per task, and, less noisy, what the merge
recovers of the experts on held-out texts.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.func import functional_call

import trainmerge as tm
from tests.bench.__main__ import figure
from trainmerge.coefficients.initial import Initial
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.score_task import score_tasks
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import load_tasks
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.held_out import HeldOutJudge
from trainmerge.objectives.entropy import entropy

TEXTS, BATCH, LENGTH = 100, 2, 64
ADAMERGING, PLAIN = int(os.environ.get("STEPS", "500")), 5
Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
UNIFORM, SOLVED = 0.4, tm.LayerLeastSquares()


def adam(c: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The demo's optimizer."""
    return torch.optim.Adam(c, lr=0.05)


def lbfgs(c: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Torch's, with its line search."""
    return torch.optim.LBFGS(c, max_iter=6, line_search_fn="strong_wolfe")


def newton(c: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Ours."""
    return tm.NewtonCG(c, products=5, radius=2.0)


ADAM_STEPS = (5, 10, 20, 40)
FITS: dict[str, tuple[Initial, Make, int, tuple[int, ...]]] = {  # texts per task, steps that are scored
    "uniform_adam": (UNIFORM, adam, 4, ADAM_STEPS),
    "uniform_lbfgs": (UNIFORM, lbfgs, 16, (1, 2, 3)),
    "uniform_newton": (UNIFORM, newton, 16, (1, 2, 3)),
    "uniform_newton_64_texts": (UNIFORM, newton, 64, (1, 2)),
    "least_squares_adam": (SOLVED, adam, 4, ADAM_STEPS),
}
Point = tuple[float, float, float]  # CPU seconds, accuracy, recovered share


class Watch(pl.Callback):
    """Scores after some steps, and the CPU seconds until then without those of scoring."""

    def __init__(self, module: tm.MergeModule, data: tm.Calibration, steps: Iterable[int]) -> None:
        self.begun, self.found = time.process_time(), list[Point]()
        self.module, self.steps = module, frozenset(steps)
        module.load(data)
        recipe, seconds = module.recipe, time.process_time() - self.begun
        words = Tokenizer(recipe.base, LENGTH)
        heads = dict(zip(recipe.experts, module.resident.classifiers, strict=True))
        self.subject = Subject(module.resident.merged.module, heads, words)
        self.tasks, _ = load_tasks(recipe, words, limit=TEXTS)
        self.judge = HeldOutJudge.of(module.inputs(data), module.resident, module.objective, None)
        self.begun = time.process_time() - seconds

    def score(self) -> None:
        """Add a point."""
        seconds = time.process_time() - self.begun
        share = float(self.judge.recovered().mean())  # materialises the merge
        scores = score_tasks(self.subject, self.tasks)
        accuracy = sum(score.score for score in scores.values()) / len(scores)
        self.found.append((seconds, accuracy, share))
        print(f"  {seconds:.1f} s {accuracy:.4f} {share:.4f}", flush=True)
        self.begun = time.process_time() - seconds

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.score()


def learn(
    place: Path, make: Make, initial: Initial, objective: tm.Objective, batch: int, scored: Sequence[int]
) -> list[Point]:
    """The points at the start and after some steps of one fit; the last of them ends it."""
    settings = from_config("configs/demo.yaml", place / "read")
    recipe, files = settings.module.recipe, settings.data.files
    workspace = str(place / "workspace")
    module = tm.MergeModule(
        recipe, objective, initial=initial, optimizer=make, tasks_per_backward=4, workspace=workspace
    )
    data = tm.Calibration(
        files, recipe.base, batch_size=batch, max_examples=256, max_length=LENGTH, held_out=0.2
    )
    watch = Watch(module, data, scored)
    watch.score()
    trainer = pl.Trainer(
        max_steps=max(scored), accelerator="cpu", callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return watch.found


def plain_seconds(place: Path) -> float:
    """CPU seconds of one AdaMerging step as a plain autograd loop, the merge inside the graph."""
    settings = from_config("configs/demo.yaml", place / "read")
    module = tm.MergeModule(settings.module.recipe, tm.Entropy(), workspace=str(place / "plain"))
    data = tm.Calibration(
        settings.data.files, settings.module.recipe.base, batch_size=BATCH, max_length=LENGTH
    )
    module.load(data)
    model, coefficients = module.resident.merged.module, module.coefficients
    optimizer, losses = torch.optim.Adam(coefficients.parameters(), lr=1e-3), torch.zeros(())
    begun = time.process_time()
    for step in range(PLAIN):
        merged = tm.merged_weights(module.opened.task_vectors, coefficients)
        weights = {module.resident.merged.names.get(name, name): own for name, own in merged.items()}
        losses = torch.zeros(())
        for k, examples in enumerate(data.examples):
            batch = module.resident.batch(k, examples[step * BATCH :][:BATCH], data.tokenize)
            hidden = functional_call(model, weights, kwargs=dict(batch.inputs)).last_hidden_state
            head = module.resident.classifiers[k]
            losses = losses + entropy(head(hidden, batch.inputs["attention_mask"].bool())).mean()
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    return (time.process_time() - begun) / PLAIN


def figure_until(name: str, reached: list[float]) -> None:
    """The first of the seconds at which a merge was good enough; no figure if it never was."""
    if reached:
        figure(name, reached[0], "CPU seconds", "")


def main() -> None:
    """AdaMerging, then every start with its optimizers."""
    guarded, curves = tm.Entropy(agreement=5.0), dict[str, list[Point]]()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        place = Path(folder)
        for name, (initial, make, batch, scored) in FITS.items():
            print(name, flush=True)
            curves[name] = learn(place / name, make, initial, guarded, batch, scored)
        plain = plain_seconds(place)
        slow: Make = lambda c: torch.optim.Adam(c, lr=1e-3)  # noqa: E731
        published = learn(place / "published", slow, 0.3, tm.Entropy(), BATCH, (ADAMERGING,))
    best = max(share for points in curves.values() for _, _, share in points)
    begin = curves["uniform_adam"][0][2]
    figure("accuracy_adamerging_start", published[0][1], "accuracy", "")
    figure("accuracy_adamerging_500", published[-1][1], "accuracy", "")
    figure("recovered_adamerging_500", published[-1][2], "share", "")
    figure("seconds_adamerging_500", published[-1][0], "CPU seconds", "")
    figure("seconds_plain_loop_500", plain * ADAMERGING, "CPU seconds", "")
    figure("recovered_uniform_start", begin, "share", "")
    for name, points in curves.items():
        better = [seconds for seconds, accuracy, _ in points if accuracy >= published[-1][1]]
        near = [seconds for seconds, _, share in points if share >= begin + 0.95 * (best - begin)]
        figure_until(f"seconds_to_adamerging_{name}", better)
        figure_until(f"seconds_to_95_{name}", near)
        figure(f"recovered_{name}", max(share for *_, share in points), "share", "")
        figure(f"accuracy_{name}", points[-1][1], "accuracy", "")
        if name == "uniform_adam" and better:
            figure("time_to_adamerging_over_plain_loop", better[0] / (plain * ADAMERGING), "ratio", "<= 0.1")


if __name__ == "__main__":
    main()
