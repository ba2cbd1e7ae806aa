"""Learn a merge of any module of torch: your own forward, your own loaders, no folders.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Constraint, Free
from trainmerge.coefficients.initial import Initial, read_initial
from trainmerge.coefficients.layout import Grouping
from trainmerge.fitting.learned import warn_if_at_bound, warn_if_unchanged
from trainmerge.fitting.module_run import ModuleRun, describe_modules
from trainmerge.fitting.module_steps import ModuleSteps
from trainmerge.fitting.module_tasks import ModuleTasks, PlainLoss, Stream
from trainmerge.model.batch_norm import Forward, batch_norm_statistics, call
from trainmerge.model.concrete import Concrete, ConcreteMasks
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.plain_models import ModelWeights, PlainModels, open_models
from trainmerge.model.state_dicts import Loaders, check_buffers, rule_buffers, task_weights
from trainmerge.objectives import Objective
from trainmerge.preprocess import Preprocess, apply_in_memory
from trainmerge.run.folder import RunFolder
from trainmerge.system.ranges import check_option
from trainmerge.system.text import listed
from trainmerge.task_vectors.buffers import BufferRule
from trainmerge.task_vectors.state_dicts import StateDict


@dataclass(frozen=True)
class FittedModule:
    """The result of `fit_module`."""

    module: nn.Module  # the merge: a copy of the base's module, in evaluation mode
    coefficients: Coefficients
    losses: Sequence[Mapping[str, float]]  # of each step: expert -> its weighted loss
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # parameter -> the weights that are merged


def fit_module(
    module: nn.Module,
    experts: Mapping[str, ModelWeights],
    loaders: Loaders,
    loss: Objective | PlainLoss,
    *,
    steps: int,
    forward: Forward = call,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = lambda c: torch.optim.Adam(c, lr=0.02),
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    preprocess: Sequence[Preprocess] = (),
    grouping: Grouping = Grouping(),  # noqa: B008 - frozen
    constraint: Constraint = Free(),  # noqa: B008 - frozen
    initial: Initial = 0.3,
    anchor: Anchor = Anchor(),  # noqa: B008 - frozen
    combine: nn.Module | None = None,
    clip: float = 0.0,
    weights: Mapping[str, float] | None = None,
    buffers: BufferRule | None = None,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
    masks: Concrete | None = None,
    run: str | Path | None = None,
    save_every: int = 10,
) -> FittedModule:
    """Learn the coefficients of a merge of modules, on their device; no argument is changed.

    A step takes one batch of each expert's loader. All layers are in evaluation mode. An expert's outputs,
    for objectives that need them, come from the one module as that expert, with its own buffers: once for
    each batch of a list, or in each step for a DataLoader, whose batches may differ every time.

    Args:
        module: The base.
        experts: Name -> module, state dict or path of each expert.
        loaders: Expert -> batches of its task: a list, or anything else that can be iterated again.
        loss: An objective (`tm.Entropy`, `tm.Alignment`, your own), or a function of what `forward` returned
            and the batch, to one number or one per example.
        steps: Optimizer steps.
        forward: Runs a module on a batch: logits [B, V] or [B, T, V], or `tm.Outputs` with hidden states. By
            default `module(batch)` on the module's device; of a tuple its first entry, of a mapping keywords.
        optimizer: As in `MergeModule`, like all that follow down to `clip`.
        lr_scheduler: Stepped once per step.
        preprocess: Applied to the task vectors, in order, in memory.
        grouping: Which parameters share a coefficient.
        constraint: The set that coefficients stay in.
        initial: Their start.
        anchor: A penalty on their distance from it.
        combine: Aggregates the experts' gradients.
        clip: Maximal norm of the gradient over all coefficients.
        weights: Of the experts' losses, and in averaged buffers; by default 1.
        buffers: As in `merge_state_dicts`. `reestimate` estimates batch norms' statistics on all loaders at
            the start, which all steps use, and again at the end.
        ignore: fnmatch patterns of tensors that keep the base's value.
        allow_pickle: Read files of torch.save too.
        masks: Learn one mask over all merged weights too (Concrete subspace). The result has the mean mask,
            cut at 1/2. Rows with a coefficient each, `Grouping("chunk", chunks=...)` with as many chunks as
            rows, cost far less: try them first.
        run: A run folder, from which the same call resumes after it was stopped, to the same bits. Loaders
            are drawn again up to its step, and must give the same batches.
        save_every: Steps between its snapshots.

    Raises:
        ValueError: lists every mismatch of the state dicts; a setting or loader that cannot work; a loss that
            is not finite; a run of other models, settings or batches.
    """
    names = tuple(experts)
    check_option("steps", steps, int, "[1, inf)")
    check_option("clip", clip, float, "[0, inf)")
    check_buffers(buffers, module, loaders)
    if loaders.keys() != {*names}:
        raise ValueError(f"loaders for {listed([*loaders], 12)}, and the experts are {listed(names, 12)}")
    check_option("save_every", save_every, int, "[1, inf)")
    if masks is not None and (run is not None or combine is not None):
        raise ValueError(
            "masks are kept in no run folder, and their gradients are summed: leave out run and combine"
        )
    if masks is not None and any(parameter.dtype == torch.float16 for parameter in module.parameters()):
        raise ValueError("masks: their gradients do not fit float16; hold the weights in float32 or bfloat16")
    streams = [Stream(name, loaders[name], compared=run is not None) for name in names]
    shares = task_weights(weights, names)
    models = open_models(module, experts, ignore, allow_pickle)
    vectors = apply_in_memory(models.task_vectors, preprocess)
    layout = grouping.layout(vectors.shapes)
    coefficients = Coefficients(names, layout, read_initial(initial, names, layout), constraint)
    work = deepcopy(module).eval()
    work.load_state_dict(rule_buffers(models, buffers, shares), strict=False)
    shapes, device = {name: vectors.shapes[name] for name in layout.groups}, next(work.parameters()).device
    learned = None if masks is None else ConcreteMasks(masks, shapes, device)
    merged = MergedModel(work, vectors, coefficients, originals=models.task_vectors, masks=learned)

    def settle() -> None:
        """Write the merge into the module, with buffers by the rule."""
        merged.materialise()
        if buffers == "reestimate":
            batches = chain.from_iterable(loaders.values())
            work.load_state_dict(batch_norm_statistics(work, batches, forward), strict=False)

    settle()
    tasks = ModuleTasks(merged, loss, forward, shares, own_buffers(models))
    stepping = ModuleSteps(tasks, streams, optimizer, lr_scheduler, anchor, combine, clip)
    if run is None:
        losses = [stepping.step(number) for number in range(steps)]
    else:
        settings = {
            "preprocess": preprocess, "grouping": grouping, "ignore": ignore, "buffers": buffers,
            "objective": loss, "forward": forward, "optimizer": stepping.optimizer,
            "lr_scheduler": stepping.scheduler, "constraint": constraint, "anchor": anchor,
            "combine": combine, "clip": clip, "weights": shares,
        }  # fmt: skip
        described = describe_modules(module, models, coefficients, settings)
        losses = ModuleRun(RunFolder(Path(run)), steps, save_every, described).take(stepping)
    warn_if_unchanged(coefficients, stepping.start, "steps")
    warn_if_at_bound(coefficients)
    if learned is not None:
        learned.settle()
    settle()
    result = deepcopy(module).eval()
    result.load_state_dict(work.state_dict())
    kept = {name: learned.kept(name) for name in learned.logits} if learned is not None else {}
    return FittedModule(result, coefficients, losses, kept)


def own_buffers(models: PlainModels) -> list[StateDict]:
    """Each expert's buffers by name, K."""
    names = models.compared.buffers
    return [{name: own[name] for name in names} for own in models.compared.experts.values()]
