"""The plan of a fit, and the sizes that it is made of.

Legend: `K` experts, `B` examples of one expert and step, `T` tokens.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trainmerge.checkpoints import OwnHead, attach_side_layers, build_meta_model, locate
from trainmerge.data.batch import Batch
from trainmerge.data.calibration import Calibration
from trainmerge.data.heads import Head
from trainmerge.fitting.foresight import foresight
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.optimisation import build_optimisation
from trainmerge.fitting.recorded_sizes import Records, recorded_sizes
from trainmerge.fitting.vector_bytes import vector_bytes
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.embedding import read_embedding
from trainmerge.model.low_rank_gradient import tappable
from trainmerge.model.one_pass import sets_of
from trainmerge.model.own_head import OwnModel, attach
from trainmerge.plan.devices import Device, measured
from trainmerge.plan.dry_run import dry_run
from trainmerge.plan.micro_batches import StepSchedule, rounds
from trainmerge.plan.plan import Plan
from trainmerge.plan.sizes import Sizes, sizes_of
from trainmerge.run.heads import task_heads
from trainmerge.system.memory import anonymous
from trainmerge.task_vectors.places import parameter_of

Precision = Callable[[], AbstractContextManager[Any]]


def plan_fit(
    module: MergeModule,
    data: Calibration,
    precision: Precision = nullcontext,
    device: Device | None = None,
    devices: int = 1,
    schedule: StepSchedule | None = None,
    limit: int = 0,
    processes: int = 0,
) -> Plan:
    """The plan of `tm.fit(module, data, ...)`: reads headers and the longest examples, but no weight.

    Args:
        module: The merge to learn.
        data: The calibration data; the dry run uses each expert's longest examples.
        precision: The fit's autocast.
        device: The device whose speeds give the times; by default this processor, measured.
        devices: The number of devices that share the model.
        schedule: How a step is split into backwards; by default the module's.
        limit: Bytes of its memory that each device may use; 0 is 9 of 10 of a known memory.
        processes: The number of devices that share the examples, as many or more; 0 is `devices`.
    """
    schedule = schedule or module.schedule
    if module.rule is not None:
        schedule = replace(schedule, tasks=1)  # each expert needs its own gradient
    model = _empty_model(module)
    data = module.on_policy.planned(data) if module.on_policy else data
    share = -(-data.batch_size // (processes or devices))
    step = [_longest(data, k, share) for k in range(len(data.examples))]
    records = recorded_sizes(module, data, step, model.module)
    learned = {parameter_of(model.names[name]) for name in module.opened.layout.learned}
    sizes = _sizes(module, model, records, learned)
    if schedule.recompute:
        recompute_blocks(model.module)
    parts = list(rounds(step, schedule))
    heads = _heads(module, model)
    pooling = module.objective.asks.embedding
    embedding = None if pooling is None else read_embedding(module.opened.base, pooling)
    device = device or measured(next(iter(model.dtypes.values())))
    needs = dry_run(
        model.module,
        learned,
        parts,
        module.objective,
        heads,
        model.dtypes,
        precision,
        records.width,
        embedding,
        turns=device.link > 0 and devices == 1,
    )
    before = anonymous() if sys.platform == "linux" and not device.link else 0
    held = before, module.settings.vectors, limit, module.settings.gathered_ahead
    one_pass = (processes or devices) == 1 and _one_pass(module, model, precision)
    return Plan(sizes, schedule, needs, len(parts), device, devices, *held, one_pass)


def _one_pass(module: MergeModule, model: "_EmptyModel", precision: Precision) -> bool:
    """Whether the fit writes merges in the backward before, if its task vectors are sent."""
    with precision():
        casts = [torch.get_autocast_dtype(on) for on in ("cpu", "cuda") if torch.is_autocast_enabled(on)]
    settings, layout = module.settings, module.opened.layout
    if module.rule is not None or torch.float16 in (*casts, *model.dtypes.values()):
        return False
    optimizer = build_optimisation(module).optimizer
    if foresight(module.coefficients, optimizer, module.anchor, module.start, module.clip) is None:
        return False
    own = dict(model.module.named_parameters())
    whole = {name: own[model.names[name]] for name in layout.learned if model.names[name] in own}
    stored = not (module.recipe.preprocess or settings.quantise or settings.subspace)
    if stored and any(True for _ in tappable(model.module, whole, module.opened.task_vectors.deltas)):
        return False
    return bool(sets_of({name: layout.groups[name] for name in layout.learned}, vector_bytes(module)))


def _heads(module: MergeModule, model: "_EmptyModel") -> dict[int, Head | OwnModel]:
    """The experts' heads by number, own ones over the empty model."""
    found: dict[int, Head | OwnModel] = {}
    for k, head in enumerate(task_heads(module.recipe, module.opened).values()):
        if isinstance(head, OwnHead):
            found[k] = attach(head, model.module, model.names, torch.zeros(0, dtype=torch.int64))
        elif head is not None:
            found[k] = head
    return found


class _EmptyModel(NamedTuple):
    """The base on the meta device, and the dtypes of its parameters."""

    module: nn.Module
    names: Mapping[str, str]  # name in the files -> the parameter's
    dtypes: Mapping[str, torch.dtype]  # of each parameter in the fit


def _empty_model(module: MergeModule) -> _EmptyModel:
    base = module.opened.base
    meta_model = build_meta_model(base.path)
    names = locate(meta_model, base.path, base.tensors, module.opened.ignore)
    names |= attach_side_layers(meta_model, base, "meta")
    dtypes = {
        parameter_of(inside): module.settings.dtype or base.info(name).dtype for name, inside in names.items()
    }
    return _EmptyModel(meta_model, names, dtypes)


def _sizes(module: MergeModule, model: _EmptyModel, records: Records, learned: Collection[str]) -> Sizes:
    opened, names = module.opened, model.names
    parameters = dict(model.module.named_parameters())
    own = {name: p.numel() * model.dtypes.get(name, p.dtype).itemsize for name, p in parameters.items()}
    stored = sum({names[n]: opened.base.info(n).nbytes for n in names}.values())
    read: dict[str, int] = {}
    for name, count in vector_bytes(module).items():
        parameter = parameter_of(names[name])
        read[parameter] = read.get(parameter, 0) + count
    files = [file for folder in opened.folders.values() for file in Path(folder).glob("*.safetensors")]
    return sizes_of(
        model.module,
        own,
        read,
        learned,
        len(module.recipe.experts),
        module.coefficients.raw.numel(),
        sum(file.stat().st_size for file in files) + records.files,
        max(records.memory, stored - sum(own.values())),  # a model is loaded as stored, then cast
    )


def _longest(data: Calibration, expert: int, count: int) -> Batch:
    """The batch of an expert's longest examples, by their characters."""
    own = sorted(data.examples[expert], key=lambda example: -len(example.text))
    chosen = (own * count)[:count] if len(own) < count else own[:count]
    encoded = data.tokenize.encode(chosen)
    rows = data.tokenize.rows(chosen, encoded.inputs)
    return Batch(expert, encoded.inputs, encoded.mask, torch.arange(count), rows=rows)
