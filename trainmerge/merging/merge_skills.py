"""Several LoRAs of one diffusers pipeline as one LoRA: the weighted sum of their products, exactly or cut.

Factors are stacked, `[w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2]`, so the LoRA's change is sum_k w_k s_k B_k A_k.
The average of the factors themselves is another matrix. A rank cuts each layer's singular values.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.pipeline import Pipeline
from trainmerge.export.form import DtypeName
from trainmerge.kernels import LowRank, Untouched
from trainmerge.merging.document import Document
from trainmerge.merging.group import Group
from trainmerge.merging.open_merge import method_settings
from trainmerge.merging.pipeline_experts import open_experts, task_terms
from trainmerge.merging.sphere import nonzero
from trainmerge.merging.values import parameter_places
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.task_vectors.changes import Change
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.factors import Budget, recompress


def merge_skills(
    document: Document, out: Path, overwrite: bool, dtype: DtypeName | None, rank: int | None
) -> Path:
    """Write one file in diffusers' key form, which `load_lora_weights` reads on the base.

    Args:
        document: A merge of LoRAs by `task_arithmetic`, its models as local paths.
        out: The file to create.
        overwrite: Replace it if it exists.
        dtype: Of the factors; float32 by default.
        rank: The most singular values per layer; by default all, exactly.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        ValueError: another method, or an expert that is no LoRA.
    """
    if document.method != "task_arithmetic":
        raise ValueError(f"{out.name}: one LoRA of several is their task_arithmetic, not {document.method}")
    base, experts = open_experts(document)
    if whole := [name for name, expert in experts.items() if isinstance(expert, Pipeline)]:
        raise ValueError(f"{whole[0]}: not a LoRA, and a file is one LoRA of several: name a folder with -o")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another, or overwrite it (--overwrite)")
    shared, each = method_settings(document)
    located = parameter_places(list(base.tensors))
    budget, chosen = Budget(rank), getattr(torch, dtype or "float32")
    tensors: dict[str, Tensor] = {}
    lost = square = 0.0
    for name, terms in task_terms(base, experts).items():
        place = Group(Delta(base.read(name), terms), (), tuple(experts), True, located[name], shared, each)
        factors = recompress(*_change(name, place).stacked(), budget).rounded(chosen)
        lost, square = lost + factors.lost, square + factors.square
        up, down = _shaped(factors.up, factors.down, base.tensors[name].shape)
        layer = _key(base, name)
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    _write(out, tensors, document, (lost / square) ** 0.5 if square else 0.0)
    return out


def _change(name: str, group: Group) -> Change:
    """sum_k w_k tau_k, with the weights of the method's settings at this tensor."""
    weights = torch.tensor(group.numbers("weight"), dtype=torch.float64) * group.number("lambda")
    if group.flag("normalize"):
        weights = weights / nonzero(sum(group.numbers("weight")), group, "weight")
    assert all(isinstance(term, LowRank | Untouched) for term in group.delta.terms)
    return Change(name, group.delta, weights[:, None])


def _key(base: Pipeline, name: str) -> str:
    """The name of a layer in diffusers' key form."""
    part, tensor = base.split(name)
    layer = tensor.removesuffix(".weight")
    return f"{part.name}.{layer}" if part.name else layer


def _shaped(up: Tensor, down: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Factors [m, r] and [r, n] in the shapes of a linear layer's or a convolution's."""
    ones = [1] * (len(shape) - 2)
    return up.contiguous().view(*up.shape, *ones), down.contiguous().view(len(down), *shape[1:])


def _write(out: Path, tensors: dict[str, Tensor], document: Document, error: float) -> None:
    """Write the LoRA, with what it is in its metadata: numbers of models, weights and error, no path."""
    facts = {"models": len(document.merged), "method": document.method, "relative_error": error}
    metadata = {"format": "pt", "trainmerge": json.dumps(facts)}
    specs = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, specs, tensors.items(), metadata)
