"""Fits and scores of the demo's experts for `beyond`, each with its outcomes on every test text."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

import trainmerge as tm
from trainmerge.coefficients.chunk_allocation import allocate_chunks, magnitude
from trainmerge.coefficients.coefficients import save_coefficients
from trainmerge.coefficients.initial import Initial
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.score_task import score_task, score_tasks
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task, load_tasks
from trainmerge.fitting.held_out import HeldOutJudge
from trainmerge.run.recipe import Recipe

TEXTS, STEPS, LENGTH = 256, 80, 64
TESTS = 500  # of each task
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9)
Teach = Callable[[tm.MergeModule, tm.Calibration], None]


@dataclass
class Lab:
    """Fits and scores the demo's experts.

    Args:
        place: A folder for coefficients and workspaces.
        recipe: The demo's.
        start: The coefficients that every fit starts from.
        outcomes: Row -> task -> each test text's contribution [N, 2].
        recovered: Row -> mean recovered share on held-out texts.
        seconds: Row -> CPU seconds of the fit, loading included.
    """

    place: Path
    recipe: Recipe
    start: float = 0.4
    outcomes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    recovered: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def data(self, seed: int = 0, texts: int = TEXTS) -> tm.Calibration:
        """The first texts of each expert, a fifth of them held out; the held-out ones depend on the seed."""
        files = {name: str(expert.calibration) for name, expert in self.recipe.experts.items()}
        shape = {"batch_size": 4, "max_length": LENGTH, "max_examples": texts}
        return tm.Calibration(files, self.recipe.base, **shape, held_out=0.2, seed=seed)

    def module(self, initial: Initial, recipe: Recipe | None = None) -> tm.MergeModule:
        """The demo's merge, objective and optimizer."""
        return tm.MergeModule(
            recipe or self.recipe, tm.Entropy(agreement=5.0), initial=initial, tasks_per_backward=4,
            optimizer=lambda c: torch.optim.Adam(c, lr=0.05), workspace=str(self.place / "workspace"),
        )  # fmt: skip

    def learn(
        self,
        row: str,
        data: tm.Calibration,
        initial: Initial | None = None,
        recipe: Recipe | None = None,
        steps: int = STEPS,
        teach: Teach | None = None,
    ) -> tm.MergeModule:
        """Fit, save the coefficients under the row's name, score; `teach` changes what it learns from."""
        begun = time.process_time()
        module = self.module(self.start if initial is None else initial, recipe)
        module.load(data)
        if teach:
            teach(module, data)
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        if steps:
            trainer.fit(module, datamodule=data)
        self.seconds[row] = time.process_time() - begun
        save_coefficients(module.coefficients, self.place / row)
        self.score(row, module)
        return module

    def score(self, row: str, module: tm.MergeModule) -> None:
        """The row's share on held-out texts, and its outcomes on the test texts."""
        self.recovered[row] = float(self.judge(module).recovered().mean())  # materialises the merge
        subject, tasks = self.subject(module)
        found = score_tasks(subject, tasks)
        self.outcomes[row] = {name: score.outcomes for name, score in found.items()}
        mean = sum(score.score for score in found.values()) / len(found)
        print(f"{row}: {mean:.4f}, recovered {self.recovered[row]:.4f}", flush=True)

    def judge(self, module: tm.MergeModule) -> HeldOutJudge:
        """By all held-out texts of the first seed."""
        return HeldOutJudge.of(module.inputs(self.data()), module.resident, module.objective, None)

    def subject(self, module: tm.MergeModule) -> tuple[Subject, list[Task]]:
        """What is scored."""
        words = Tokenizer(self.recipe.base, LENGTH)
        heads = dict(zip(self.recipe.experts, module.resident.classifiers, strict=True))
        return Subject(module.resident.merged.module, heads, words), load_tasks(
            self.recipe, words, limit=TESTS
        )[0]

    def settle(self) -> None:
        """The best uniform scale by held-out texts; then the rows of the start and of the experts."""
        module = self.module(1.0)
        module.load(self.data())
        judge, shares = self.judge(module), {}
        for scale in SCALES:
            module.coefficients.reset_(torch.full_like(module.start, scale))
            shares[scale] = float(judge.recovered().mean())
        self.start = max(shares, key=shares.__getitem__)
        module.coefficients.reset_(torch.full_like(module.start, self.start))
        self.score("uniform", module)
        subject, tasks = self.subject(module)
        self.outcomes["experts"] = {}
        for k, task in enumerate(tasks):
            with module.resident.merged.teacher(k):
                self.outcomes["experts"][task.name] = score_task(subject, task).outcomes

    def chunked(self, first: tm.MergeModule) -> Recipe:
        """The recipe of the second stage: two chunks per parameter, by importance."""
        vectors = first.opened.task_vectors
        rows = {name: vectors.shapes[name][0] for name in first.opened.layout.groups}
        chunks = allocate_chunks(magnitude(vectors, first.coefficients), rows, budget=2.0)
        file = self.place / "chunks.json"
        file.write_text(json.dumps({"chunks": chunks}))
        grouping = replace(self.recipe.grouping, granularity="chunk", chunks=str(file))
        return replace(self.recipe, grouping=grouping)
