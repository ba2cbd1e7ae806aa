"""Bytes of base and task vectors that a pass reads, before a weight is read."""

from trainmerge.fitting.module import MergeModule
from trainmerge.task_vectors.delta import Delta


def vector_bytes(module: MergeModule) -> dict[str, int]:
    """Bytes of base and task vectors that a pass will read of each merged tensor, from headers."""
    deltas = module.opened.task_vectors.deltas
    return {name: _read(module, deltas[name]) for name in module.opened.layout.groups}


def _read(module: MergeModule, delta: Delta) -> int:
    """Bytes of one parameter's base and task vectors that a pass reads."""
    if delta.base.dim() > 1 and module.settings.quantise is not None:
        return delta.base.nbytes + len(delta.terms) * int(
            module.settings.quantise.bytes_per_weight * delta.base.numel()
        )
    if module.recipe.preprocess:
        return delta.base.nbytes + len(delta.terms) * 4 * delta.base.numel()
    return delta.nbytes
