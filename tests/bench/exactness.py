"""Coefficient gradients of the resident merge against functional_call autograd, worst relative error."""

import torch
from torch import nn
from torch.func import functional_call

from tests.bench.__main__ import figure
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping, Layout
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Term, Untouched
from trainmerge.model.functional import merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.objectives.entropy import entropy
from trainmerge.task_vectors.delta import Delta, TaskVectors

EXPERTS = ("full", "given", "low-rank", "untouched")


class Tied(nn.Module):
    """Embedding tied to the output, a layer norm, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.up, self.norm, self.down = nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, 50]."""
        hidden = self.down(torch.tanh(self.norm(self.up(self.embed(ids)))))
        logits: torch.Tensor = self.head(hidden)
        return logits


def terms(base: torch.Tensor) -> tuple[Term, ...]:
    """One expert of every form; a vector has no low-rank form."""
    full, given = (base + 0.1 * torch.randn_like(base) for _ in range(2))
    low: Term = Untouched()
    if base.dim() == 2:
        up, down = torch.randn(len(base), 4), torch.randn(4, base.shape[1])
        low = LowRank(0.3 * up.to(base), 0.3 * down.to(base), 0.5)
    return ExpertWeight(full), Difference(given - base), low, Untouched()


def error(grouping: Grouping, dtype: torch.dtype) -> float:
    """Worst |difference| over the largest gradient."""
    torch.manual_seed(0)
    module = Tied().to(dtype)
    bases = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    vectors = TaskVectors(EXPERTS, {name: Delta(base, terms(base)) for name, base in bases.items()})
    layout: Layout = grouping.layout(vectors.shapes)
    coefficients = Coefficients(EXPERTS, layout, 0.3).to(dtype)
    ids = torch.randint(50, (8, 6))
    loss = entropy(
        functional_call(module, merged_weights(vectors, coefficients), (ids,), tie_weights=True)
    ).mean()
    (want,) = torch.autograd.grad(loss, coefficients.raw)
    merged = MergedModel(module, vectors, coefficients)
    merged.materialise()
    entropy(module(ids)).mean().backward()
    return float((merged.gradient() - want).abs().max() / want.abs().max())


def main() -> None:
    """The worst case over granularities, with tied, excluded, chunked and low-rank parameters."""
    whole = [Grouping("task"), Grouping("block"), Grouping("tensor", exclude=["norm.*"])]
    groupings = [*whole, Grouping("chunk", chunks=5)]
    for dtype, bar in ((torch.float32, "<= 1e-6"), (torch.float64, "<= 1e-10")):
        worst = max(error(grouping, dtype) for grouping in groupings)
        figure(f"gradient_error_{str(dtype).removeprefix('torch.')}", worst, "relative", bar)


if __name__ == "__main__":
    main()
