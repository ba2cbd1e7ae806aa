"""CPU seconds until a merge is as good as 500 AdaMerging steps, and until it has 95% of the final gap.

The demo's five experts. AdaMerging as published (entropy, 0.3, Adam at 0.001, one coefficient per tensor) but
for `BATCH` texts per task and step instead of 16, so that it ends; a plain autograd loop of the same steps is
timed beside it. Ours: the demo's guarded entropy from two starts, with three optimizers. Seconds are those of
the process from the loading of the base on, recording and measuring of the experts included, scoring not.
Quality is the mean accuracy on the first `TEXTS` test texts per task.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
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
from trainmerge.objectives.entropy import entropy

TEXTS, BATCH, LENGTH = 100, 4, 64
ADAMERGING, PLAIN = int(os.environ.get("STEPS", "500")), 5
Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
STARTS: dict[str, Initial] = {"uniform": 0.4, "least_squares": tm.LayerLeastSquares()}
OPTIMIZERS: dict[str, tuple[Make, int, int, tuple[int, ...]]] = {  # texts, steps, steps that are scored
    "adam": (lambda c: torch.optim.Adam(c, lr=0.05), 4, 80, (5, 10, 20, 40, 60, 80)),
    "lbfgs": (lambda c: torch.optim.LBFGS(c, max_iter=6, line_search_fn="strong_wolfe"), 16, 4, (1, 2, 3, 4)),
    "newton": (lambda c: tm.NewtonCG(c, products=5, radius=2.0), 16, 4, (1, 2, 3, 4)),
}


class Watch(pl.Callback):
    """Accuracy after some steps, and the CPU seconds until then without those of scoring."""

    def __init__(self, module: tm.MergeModule, tasks: Any, steps: Iterable[int]) -> None:
        self.tasks, self.steps, self.module = tasks, frozenset(steps), module
        self.begun, self.found = time.process_time(), list[tuple[float, float]]()

    def score(self) -> None:
        """Add a point."""
        seconds, resident = time.process_time() - self.begun, self.module.resident
        resident.merged.materialise()
        heads = dict(zip(self.module.recipe.experts, resident.classifiers, strict=True))
        words = Tokenizer(self.module.recipe.base, LENGTH)
        scores = score_tasks(Subject(resident.merged.module, heads, words), self.tasks)
        accuracy = sum(score.score for score in scores.values()) / len(scores)
        self.found.append((seconds, accuracy))
        print(f"  {seconds:.1f} s {accuracy:.4f}", flush=True)
        self.begun += time.process_time() - self.begun - seconds

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.score()


def learn(
    place: Path, make: Make, initial: Initial, objective: Any, batch: int, steps: int, scored: Iterable[int]
) -> list[tuple[float, float]]:
    """(seconds, accuracy) at the start and after some steps of one fit."""
    settings = from_config("configs/demo.yaml", place / "read")
    recipe, files = settings.module.recipe, settings.data.files
    workspace = str(place / "workspace")
    module = tm.MergeModule(
        recipe, objective, initial=initial, optimizer=make, tasks_per_backward=4, workspace=workspace
    )
    data = tm.Calibration(files, recipe.base, batch_size=batch, max_examples=256, max_length=LENGTH)
    tasks, _ = load_tasks(recipe, Tokenizer(recipe.base, LENGTH), limit=TEXTS)
    watch = Watch(module, tasks, scored)
    module.load(data)
    watch.score()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[watch], logger=False, enable_checkpointing=False,
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


def figure_until(name: str, points: list[tuple[float, float]], wanted: float) -> None:
    """The seconds of the first point that is good enough; no figure if none is."""
    reached = [seconds for seconds, accuracy in points if accuracy >= wanted]
    if reached:
        figure(name, reached[0], "CPU seconds", "")


def main() -> None:
    """AdaMerging, then every start with every optimizer."""
    guarded, curves = tm.Entropy(agreement=5.0), dict[str, list[tuple[float, float]]]()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        place = Path(folder)
        adam: Make = lambda c: torch.optim.Adam(c, lr=1e-3)  # noqa: E731
        published = learn(place / "a", adam, 0.3, tm.Entropy(), BATCH, ADAMERGING, (ADAMERGING,))
        plain = plain_seconds(place)
        for start, initial in STARTS.items():
            for name, (make, batch, steps, scored) in OPTIMIZERS.items():
                print(start, name, flush=True)
                own = place / f"{start}-{name}"
                curves[f"{start}_{name}"] = learn(own, make, initial, guarded, batch, steps, scored)
    goal, begin = published[-1][1], published[0][1]
    best = max(accuracy for points in curves.values() for _, accuracy in points)
    first = curves["uniform_adam"][0][1]
    figure("quality_adamerging_start", begin, "accuracy", "")
    figure("quality_adamerging_500", goal, "accuracy", "")
    figure("seconds_adamerging_500", published[-1][0], "CPU seconds", "")
    figure("seconds_plain_loop_500", plain * ADAMERGING, "CPU seconds", "")
    figure("quality_best", best, "accuracy", "")
    for name, points in curves.items():
        figure_until(f"seconds_to_adamerging_{name}", points, goal)
        figure_until(f"seconds_to_95_{name}", points, first + 0.95 * (best - first))
        figure(f"quality_{name}", max(accuracy for _, accuracy in points), "accuracy", "")


if __name__ == "__main__":
    main()
