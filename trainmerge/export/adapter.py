"""Changes of a base's parameters -> a LoRA adapter in peft's form, one module at a time.

alpha is the rank in every module, so the scale is 1, also for programs that ignore patterns of ranks. Memory
holds one module's change and the adapter itself.

Legend: `r` rank of a module, `m x n` its weight as stored, `T` terms, `C` chunks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainmerge.checkpoints.whole import PATCH
from trainmerge.export.adapter_form import AdapterForm, AdapterReport, Written, relative_error
from trainmerge.export.adapter_source import AdapterSource, check_budget, check_rest
from trainmerge.kernels import accumulation_dtype
from trainmerge.system.console import progress
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.safetensors_file import sha256, write_safetensors
from trainmerge.system.safetensors_format import file_order
from trainmerge.task_vectors.factors import EXACT, Factors, recompress, truncate

if TYPE_CHECKING:  # imports transformers and peft
    from trainmerge.checkpoints import LoraTarget

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@torch.no_grad()
def write_adapter(
    source: AdapterSource, form: AdapterForm, folder: Path
) -> tuple[AdapterReport, dict[str, str]]:
    """Write configuration, factors and patch into a folder; returns the report, and files' SHA-256.

    Raises:
        ValueError: nothing changes, changes that no LoRA holds without a choice in `form.rest`, or dense
            changes without rank or energy.
    """
    modules, rest = source.divided(form)
    sizes = {name: source.changes[name].square() for name in rest}
    rest = [name for name in rest if sizes[name] > 0]
    check_rest(source, form, modules, {name: sizes[name] for name in rest})
    check_budget(source, form, modules)
    made: dict[str, Factors] = {}
    quick = all(source.changes[name].low_rank for name in modules)
    for name in progress(modules, "factors", disable=quick):
        if (factors := _factors(source, form, name)).square > 0:
            made[name] = factors
    if not made:
        raise ValueError(
            f"{source.label} changes no module that a LoRA can change: there is no adapter to write"
        )
    tensors = {key: part for name in made for key, part in stored(source.targets.modules[name], made[name])}
    config = adapter_config(source, {source.targets.modules[name]: made[name].rank for name in made})
    source.targets.check(config, {key: part.shape for key, part in tensors.items()})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files = {WEIGHTS: _write(folder / WEIGHTS, tensors)}
    if rest and form.rest == "patch":
        files[PATCH] = write_patch(source, rest, folder / PATCH)
    source.base.check_unchanged()
    return _report(source, form, made, {name: sizes[name] for name in rest}), files


def adapter_config(source: AdapterSource, ranks: Mapping["LoraTarget", int]) -> dict[str, Any]:
    """peft's configuration for modules of these ranks."""
    most = max(ranks.values())
    own = {_pattern(target.module, ranks): rank for target, rank in sorted(ranks.items()) if rank != most}
    kind, parent = source.targets.model_class
    task = source.targets.task_type
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": kind, "parent_library": parent},
        "base_model_name_or_path": source.base_id[0],
        "revision": source.base_id[1],
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "target_modules": source.targets.patterns(target.module for target in ranks),
        "rank_pattern": own,
        "alpha_pattern": dict(own),
        "fan_in_fan_out": any(target.kind == "transposed" for target in ranks),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _pattern(module: str, ranks: Mapping["LoraTarget", int]) -> str:
    """The module's whole name; anchored if it is the end of another module's, as peft matches ends."""
    inside = any(other.module.endswith(f".{module}") for other in ranks)
    return "^" + module if inside else module


def stored(target: "LoraTarget", factors: Factors) -> Iterator[tuple[str, Tensor]]:
    """peft's A and B of a module, under their names; a transposed weight is (B A)^T."""
    up, down = factors.up, factors.down
    if target.kind in ("transposed", "embedding"):
        up, down = down.T, up.T
    yield from zip(target.names(), (down.contiguous(), up.contiguous()), strict=True)


def write_patch(source: AdapterSource, names: Sequence[str], path: Path) -> str:
    """Write differences under the model's parameter names, in float32 or wider; returns the SHA-256."""
    inside = {source.targets.parameters[name]: source.changes[name] for name in names}
    kinds = {key: accumulation_dtype(change.delta.base.dtype) for key, change in inside.items()}
    specs = {key: (kinds[key], tuple(change.shape)) for key, change in inside.items()}
    pairs = ((key, block.to(kinds[key])) for key in file_order(specs) for block in inside[key].blocks())
    check_free_space(path.parent, sum(kinds[key].itemsize * c.shape.numel() for key, c in inside.items()))
    write_safetensors(path, specs, pairs, {"format": "pt"})
    return sha256(path)


def _factors(source: AdapterSource, form: AdapterForm, name: str) -> Factors:
    """The factors of one module in the adapter's dtype; a convolution's kernel is part of its inputs."""
    change, target = source.changes[name], source.targets.modules[name]
    own = accumulation_dtype(change.delta.base.dtype) if form.dtype is None else getattr(torch, form.dtype)
    if change.low_rank:
        found = recompress(*change.stacked(), form.budget)
    else:
        rows, columns = change.shape[0], change.shape[1:].numel()
        wide = torch.float64 if min(rows, columns) <= EXACT else own
        found = truncate(change.dense(wide).view(rows, columns), form.budget)
    found = found.rounded(own)
    if not (found.up.isfinite().all() and found.down.isfinite().all()):
        raise ValueError(
            f"{name}: the factors of {source.label} are not finite in {str(own).removeprefix('torch.')}; "
            "check the coefficients with `trainmerge inspect`, or write another dtype"
        )
    if target.kind != "convolution":
        return found
    ones = [1] * len(change.shape[2:])
    return found._replace(
        up=found.up.view(*found.up.shape, *ones), down=found.down.view(-1, *change.shape[1:])
    )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    specs = {key: (part.dtype, tuple(part.shape)) for key, part in tensors.items()}
    check_free_space(path.parent, sum(part.nbytes for part in tensors.values()))
    write_safetensors(path, specs, ((key, tensors[key]) for key in file_order(specs)), {"format": "pt"})
    return sha256(path)


def _report(
    source: AdapterSource, form: AdapterForm, made: Mapping[str, Factors], rest: Mapping[str, float]
) -> AdapterReport:
    square = sum(factors.square for factors in made.values()) + sum(rest.values())
    lost = sum(factors.lost for factors in made.values())
    patched = form.rest == "patch"
    return AdapterReport(
        {
            source.targets.modules[name].module: Written(
                one.rank, relative_error(one.lost, one.square), one.how
            )
            for name, one in made.items()
        },
        relative_error(lost + (0.0 if patched else sum(rest.values())), square),
        tuple(rest),
        sum(rest.values()) / square,
        patched,
    )
