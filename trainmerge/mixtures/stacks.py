"""Experts in stacks: one tensor for all of a layer, as gpt-oss, Llama 4, Granite-MoE and Qwen3-VL-MoE have.

A stack is experts x outputs x inputs, or experts x inputs x outputs; the first matrix has gate and up, one
after the other or in turn.

Legend: `E` experts of a layer, `H` hidden size, `I` width of an expert.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from trainmerge.checkpoints import Checkpoint, load_meta_model
from trainmerge.model.routing import routers_of
from trainmerge.task_vectors.places import parameter_of

ROUTER = re.compile(r"(.*\.)(?:gate|router)(?:\.layer)?\.weight")
STACKS = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")


def find_stacks(base: Checkpoint) -> dict[str, tuple[int, dict[str, str]]]:
    """Prefix of a layer's tensors -> number of experts, and kind of matrix -> place, with {} for the expert.

    Raises:
        ValueError: experts with other tensors than gate, up and down projections and their biases.
    """
    loaded = load_meta_model(base)
    files = {inside: name for name, inside in loaded.names.items()}
    turned = {parameter_of(inside): name for inside, name in files.items() if inside.endswith("[:].T")}
    found = {}
    for path, router in routers_of(loaded.module).items():
        block, weight = path.rpartition(".")[0], files.get(f"{path}.weight", "")
        prefix = ROUTER.fullmatch(weight)
        experts = getattr(loaded.module.get_submodule(block), "experts", None)
        if prefix is None or not isinstance(experts, nn.Module):
            raise ValueError(f"{base.path}: the router {path} has no experts that shrink can read")
        shapes = {name: tuple(own.shape) for name, own in experts.named_parameters()}
        inside = {name: f"{block}.experts.{name}" for name in shapes}
        of = {name: turned.get(own) or files.get(own) for name, own in inside.items()}
        if not {*STACKS} <= shapes.keys() <= {*STACKS, *BIASES} or None in of.values():
            raise ValueError(
                f"{base.path}: the experts of {block} have {', '.join(sorted(shapes))}: shrink reads a gate, "
                "an up and a down projection of each, in stacks of all experts"
            )
        mine = {name: file for name, file in of.items() if file is not None}
        wide = getattr(experts, "is_concatenated", True)
        away = {name for name, own in inside.items() if own in turned}
        count: int = router.num_experts  # type: ignore[assignment]
        found[prefix[1]] = count, _places(f"{base.path}: {block}", mine, shapes, away, wide)
    return found


def _places(
    where: str,
    files: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    away: set[str],
    concatenated: bool,
) -> dict[str, str]:
    """Kind -> place; `away` are the stacks that the files have with their last dimensions exchanged."""
    (_, x, y), (_, u, v) = (shapes[name] for name in STACKS)
    inputs_first = (x, y) == (v, 2 * u)
    width = u if inputs_first else v
    if not inputs_first and (x, y) != (2 * v, u):
        raise ValueError(f"{where}: stacks {x} x {y} and {u} x {v} are no gate, up and down projection")
    halves = (f"0:{width}", f"{width}:{2 * width}") if concatenated else ("0::2", "1::2")
    found = {}
    first, last = (files[name] for name in STACKS)
    for kind, rows in zip(("gate", "up"), halves, strict=True):
        mixed = inputs_first != (STACKS[0] in away)
        found[kind] = f"{first}[{{}},:,{rows}].T" if mixed else f"{first}[{{}},{rows}]"
        if BIASES[0] in files:
            found[f"{kind}_bias"] = f"{files[BIASES[0]]}[{{}},{rows}]"
    found["down"] = f"{last}[{{}}].T" if inputs_first != (STACKS[1] in away) else f"{last}[{{}}]"
    if BIASES[1] in files:
        found["down_bias"] = f"{files[BIASES[1]]}[{{}}]"
    return found
