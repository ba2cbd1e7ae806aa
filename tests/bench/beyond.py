"""What passes the experts' own mean on the demo, and by how much: all with the paired bootstrap.

The demo's guarded entropy from the best uniform scale by held-out texts; three seeds of it, and their mean in
coefficient space; a second stage in chunks by importance (Expert Merging++); an ensemble of experts as each
text's teacher; and, from 64 texts per expert, those on which the start and the expert disagree most, beside
as many at random. Each merge is compared with the five experts, each on its own task, on the same test texts.

Legend: `K` experts, `N` calibration texts of one, `V` classes.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import trainmerge as tm
from tests.bench.__main__ import figure
from tests.bench.beyond_lab import Lab
from trainmerge.data.examples import Example
from trainmerge.evaluate.bootstrap import score_differences
from trainmerge.fitting.calibration_loss import batches
from trainmerge.fitting.from_config import from_config

SECOND_STEPS, FEW, POOL = 40, 64, 320
Chosen = list[list[Example]]  # K lists


@torch.no_grad()
def ensemble(module: tm.MergeModule, data: tm.Calibration) -> None:
    """Each text's teacher becomes half its own expert, half all experts, weighted by confidence exp(-H)."""
    resident, experts = module.resident, range(len(module.recipe.experts))
    told: list[Tensor] = []
    for j in experts:
        with resident.merged.teacher(j):
            rows: list[list[Tensor]] = [[] for _ in experts]
            for batch in batches(resident, data):
                rows[batch.expert].append(resident(batch).logits.log_softmax(-1))
        told.append(torch.cat([torch.cat(own).flatten() for own in rows]))
    whole, first = torch.stack(told), 0  # [K, all numbers]
    for k, record in enumerate(module.loaded.teachers):
        own = record.parts["log_p"]
        p = whole[:, first : first + own.numel()].view(-1, *own.shape).exp()  # [K, N, V]
        first += own.numel()
        weights = (p * p.log()).sum(-1, keepdim=True).exp()
        mixed = (weights * p).sum(0) / weights.sum(0)
        parts = {**record.parts, "log_p": (0.5 * p[k] + 0.5 * mixed).log()}
        module.loaded.teachers[k] = replace(record, parts=parts)


@torch.no_grad()
def disagreeing(module: tm.MergeModule, pool: tm.Calibration, count: int) -> Chosen:
    """The texts of each expert with the largest KL(expert || merge) at the module's coefficients."""
    module.resident.merged.materialise()
    apart: list[list[float]] = [[] for _ in pool.examples]
    alignment = tm.Alignment()
    for batch in batches(module.resident, pool):
        told = module.loaded.teachers[batch.expert].of(batch.ids, module.resident.device)
        apart[batch.expert] += alignment(module.resident(batch), batch._replace(teacher=told)).tolist()
    return [
        [own[i] for i in sorted(range(len(own)), key=lambda i, far=far: -far[i])[:count]]
        for own, far in zip(pool.examples, apart, strict=True)
    ]


def with_texts(data: tm.Calibration, chosen: Sequence[Sequence[Example]]) -> tm.Calibration:
    """The data with these texts to learn from."""
    data.examples = [list(own) for own in chosen]
    return data


def unjudged(lab: Lab, data: tm.Calibration) -> tm.Calibration:
    """The data without the held-out texts of the first seed, by which every row is judged."""
    judged = {example.text for own in lab.data().held_out_part().examples for example in own}
    return with_texts(data, [[e for e in own if e.text not in judged] for own in data.examples])


def run(lab: Lab) -> None:
    """Every row."""
    lab.settle()
    first = lab.learn("learned_0", lab.data(0))
    lab.learn("ensemble", lab.data(), teach=ensemble)
    lab.learn("chunks", lab.data(), str(lab.place / "learned_0"), lab.chunked(first), SECOND_STEPS)
    pool, start = lab.data(texts=POOL), lab.module(lab.start)
    start.load(unjudged(lab, pool))
    far = disagreeing(start, pool, FEW)
    lab.learn("few_disagreeing", with_texts(lab.data(), far))
    lab.learn("few_random", with_texts(lab.data(), [own[:FEW] for own in pool.examples]))
    others = [lab.learn(f"learned_{seed}", unjudged(lab, lab.data(seed))) for seed in (1, 2)]
    values = torch.stack([module.coefficients().detach() for module in (first, *others)])
    others[0].coefficients.reset_(values.mean(0))
    lab.score("seeds_averaged", others[0])


def main() -> None:
    """Learn, score, compare."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        place = Path(folder)
        lab = Lab(place, from_config("configs/demo.yaml", place / "read").module.recipe)
        run(lab)
    names = list(lab.outcomes)
    tasks = {task: [lab.outcomes[row][task] for row in names] for task in lab.recipe.experts}
    gaps = score_differences(tasks, names.index("experts"), 1)
    figure("beyond_start", lab.start, "coefficient", "")
    for name, gap in zip(names, gaps, strict=True):
        own = [rows[:, 0].sum() / rows[:, 1].sum() for rows in lab.outcomes[name].values()]
        figure(f"beyond_accuracy_{name}", float(sum(own) / len(own)), "accuracy", "")
        if name != "experts":
            figure(f"beyond_above_{name}", -gap.worse_by, "accuracy", "")
            figure(f"beyond_low_{name}", -gap.high, "accuracy", "")
            figure(f"beyond_high_{name}", -gap.low, "accuracy", "")
            figure(f"beyond_recovered_{name}", lab.recovered[name], "share", "")
        if name in lab.seconds:
            figure(f"beyond_seconds_{name}", lab.seconds[name], "CPU seconds", "")


if __name__ == "__main__":
    main()
