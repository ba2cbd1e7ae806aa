"""The coefficients' gradient of every family of models, against autograd through the merge: `make families`.

Experts are full, low-rank or one of each; low-rank ones also with recomputed blocks. Low-rank experts change
what an adapter may target: linear layers (GPT-2's Conv1D too), embeddings, or all of these. `FAMILY=Mamba`
runs the families whose name contains that. Each family's line has the worst relative error of the whole
gradient and of one tensor's, and the number of weights whose gradient is taken at their layer. It is an error
if one exceeds LIMIT, or if a tensor has a gradient of exactly 0 that should have another. `--keep
FILE` writes every error of a tensor's gradient to a JSON file.

Legend: `K` experts, `G` coefficient groups.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from tests.contracts import relative_error
from tests.model_families import FAMILIES, Family
from tests.task_families import TASK_FAMILIES
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import ExpertWeight, LowRank, Term, Untouched
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.functional import merged_weights
from trainmerge.model.low_rank_gradient import tappable
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import Delta, TaskVectors

LIMIT = 1e-4
SMALL = 1e-2  # a tensor's share of the gradient below which rounding counts against this share
SIZE = 0.02  # of the experts' changes
OUTPUTS = (
    "logits", "logits_per_image", "start_logits", "prediction_logits", "image_embeds", "last_hidden_state"
)  # fmt: skip
FORMS: dict[str, Sequence[type[Term]]] = {
    "full": (ExpertWeight, ExpertWeight),
    "low-rank": (LowRank, LowRank),
    "linear": (LowRank, LowRank),
    "embeddings": (LowRank, LowRank),
    "mixed": (LowRank, ExpertWeight),
}
LINEAR = (nn.Linear, Conv1D)
TARGETS = {  # layers that low-rank experts of a form change; those of the others change all
    "linear": LINEAR,
    "embeddings": (nn.Embedding,),
}
ALL = (*LINEAR, nn.Embedding)


class Found(NamedTuple):
    """The relative errors of a gradient [K, G]."""

    whole: float
    tensor: float  # the largest one of a tensor's K coefficients
    tapped: int
    missing: int  # tensors whose gradient is 0 and should not be

    @property
    def right(self) -> bool:
        """Whether all is within LIMIT; False for NaN."""
        return self.whole <= LIMIT and self.tensor <= LIMIT and not self.missing


def sweep(
    family: Family, form: str, recompute: bool = False, device: torch.device | str = "cpu"
) -> Found | None:
    """The errors of one family's gradient; None if it has no blocks to recompute, or no such layer."""
    module = family.build()
    targets = TARGETS.get(form, ALL)
    if not any(isinstance(layer, targets) for layer in module.modules()):
        return None
    vectors = task_vectors(module, FORMS[form], targets)
    layout = Grouping("tensor").layout(vectors.shapes)
    start = 0.2 + 0.4 * torch.rand(2, len(layout.labels), generator=torch.Generator().manual_seed(1))
    coefficients = Coefficients(vectors.experts, layout, start)
    module.to(device)  # the task vectors stay, as files would
    plain = deepcopy(module)
    inputs = tree_map_only(Tensor, lambda t: t.to(device), family.inputs())
    if recompute and not recompute_blocks(module):
        return None
    merged = MergedModel(module, vectors, coefficients)
    merged.materialise()
    tapped = len(list(tappable(module, merged.parameters, vectors.deltas)))
    with merged.tapped():
        loss(merged.module(**inputs)).backward()
    got = merged.gradient()
    weights = {name: w.to(device) for name, w in merged_weights(vectors, coefficients).items()}
    (want,) = torch.autograd.grad(loss(functional_call(plain, weights, (), inputs)), coefficients.raw)
    missing = int(((got == 0) & (want != 0)).all(dim=0).sum())
    return Found(relative_error(got, want), worst_tensor(got, want), tapped, missing)


def worst_tensor(got: Tensor, want: Tensor) -> float:
    """The largest relative error of a column [K]; small columns relative to SMALL of the whole."""
    sizes = want.norm(dim=0).clamp(min=SMALL * float(want.norm()))
    return float(((got - want).norm(dim=0) / sizes).max())


def task_vectors(
    module: nn.Module, forms: Sequence[type[Term]], targets: tuple[type[nn.Module], ...] = ALL
) -> TaskVectors:
    """Random experts around a module; low-rank ones change the weights of layers of these types."""
    generator = torch.Generator().manual_seed(2)
    adapted = {id(layer.weight) for layer in module.modules() if isinstance(layer, targets)}

    def term(form: type[Term], base: Tensor, low: bool) -> Term:
        if form is ExpertWeight:
            return ExpertWeight(base + SIZE * torch.randn(base.shape, generator=generator))
        if not low:
            return Untouched()
        up, down = (torch.randn(shape, generator=generator) for shape in ((len(base), 1), (1, base.shape[1])))
        return LowRank(up, down, SIZE)

    deltas = {}
    for name, parameter in module.named_parameters():
        base = parameter.detach().clone()
        deltas[name] = Delta(base, tuple(term(form, base, id(parameter) in adapted) for form in forms))
    return TaskVectors(("a", "b"), deltas)


def loss(outputs: object) -> Tensor:
    """A random smooth function of the logits, or of what a model without logits gives."""
    logits: Tensor = next(found for name in OUTPUTS if (found := getattr(outputs, name, None)) is not None)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits)
    return (logits * weights).sum() + (logits.tanh() * weights).mean()


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--keep", type=Path, help="a JSON file to write")
    given = parser.parse_args()
    only = given.only
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = [(form, recompute) for form in FORMS for recompute in (False, form == "low-rank")]
    bad, rows = [], {}
    print(f"{'family':20} {'whole':>8} {'a tensor':>8} {'tapped':>6} {'missing':>7}  worst with")
    for name, family in (FAMILIES | TASK_FAMILIES).items():
        if only.lower() not in name.lower():
            continue
        all_found = {f"{f}, recomputed" if r else f: sweep(family, f, r) for f, r in dict.fromkeys(cases)}
        found = {case: one for case, one in all_found.items() if one is not None}
        case, worst = max(found.items(), key=lambda item: item[1].tensor)
        whole, missing = (max(one[i] for one in found.values()) for i in (0, 3))
        line = f"{name:20} {whole:8.1e} {worst.tensor:8.1e} {found['low-rank'].tapped:6} {missing:7}  {case}"
        print(line, flush=True)
        bad += [name] * (not all(one.right for one in found.values()))
        rows[name] = {case: one and one.tensor for case, one in all_found.items()}
        rows[name] |= {"tapped": found["low-rank"].tapped, "missing": missing}
    if given.keep:
        given.keep.write_text(json.dumps(rows, indent=1) + "\n")
    if bad:
        sys.exit(f"above {LIMIT}, or missing: {', '.join(bad)}")


if __name__ == "__main__":
    main()
