"""Concrete masks over rows, learned together with the coefficients: an optimizer of a merge with chunks.

A row's coefficients are m'_r c_k: c_k [K] of its tensor, and one mask number per row that all experts share,
m' = m / mean(m) within the tensor. With logits x, uniform u and a temperature T, a sample is
m = sigmoid((x + logit u) / T) (Concrete subspace, Tang et al., arXiv 2312.06173; there a number per weight).
With g [K, C] the gradient of the rows' coefficients and d_r = sum_k c_k g_kr,

    dL/dc_k = sum_r m'_r g_kr,    dL/dx_r = (d_r - mean(d m')) / mean(m) * m_r (1 - m_r) / T

so both follow from the gradient that every fit has, where the paper has two nested loops.

Legend: `K` experts, `G` coefficient groups (rows), `N` tensors.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Free
from trainmerge.coefficients.single_tensor import SingleTensorOptimizer
from trainmerge.system.ranges import check_option

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's


class ConcreteRows(SingleTensorOptimizer):
    """Optimises coefficients [K, G] of rows as a mask per row times a coefficient per tensor.

    Use it with `recipe.grouping: {granularity: chunk, chunks: N}`; with more chunks than rows every row has a
    mask number, with fewer every chunk of rows. Each step is taken at a sampled mask. Between steps the
    coefficients are those of the mean mask, sigmoid(x / T) cut at 1/2: so are snapshots and exports. A row
    that is cut has coefficients of zero.

    Args:
        params: The coefficients.
        lr: Adam's rate for the coefficients.
        mask_lr: Adam's rate for the logits, which start at 0. A row is cut once its logit is negative.
        temperature: T; smaller samples are nearer to 0 and 1.
        seed: Of the samples, which depend on it and on the step only.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        mask_lr: float = 0.05,
        temperature: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_option("ConcreteRows.lr", lr, float, "[0, inf)")
        check_option("ConcreteRows.mask_lr", mask_lr, float, "[0, inf)")
        check_option("ConcreteRows.temperature", temperature, float, "(0, inf)")
        check_option("ConcreteRows.seed", seed, int, "[0, inf)")
        super().__init__(params, {"lr": lr, "mask_lr": mask_lr, "temperature": temperature, "seed": seed})
        self._tensors: Tensor | None = None  # [G], the tensor of each row; all rows are of one without

    @staticmethod
    def follow(optimizer: Optimizer, coefficients: Coefficients) -> None:
        """Tell an optimizer of this class which rows are of one tensor; others need not know.

        Raises:
            ValueError: no tensor has two chunks, or the coefficients have a constraint.
        """
        if not isinstance(optimizer, ConcreteRows):
            return
        groups = coefficients.layout.groups
        if not isinstance(coefficients.constraint, Free):
            kind = type(coefficients.constraint).__name__
            raise ValueError(
                f"ConcreteRows: a mask times a coefficient leaves {kind}; use it without constraint"
            )
        if all(len(own) < 2 for own in groups.values()):
            raise ValueError(
                "ConcreteRows learns a mask over rows, and every tensor has one coefficient: set "
                "recipe.grouping to {granularity: chunk, chunks: 100000}, a coefficient per row"
            )
        tensors = torch.zeros(coefficients.raw.shape[1], dtype=torch.int64)
        for number, own in enumerate(groups.values()):
            tensors[list(own)] = number
        optimizer._tensors = tensors

    def kept(self) -> Tensor:
        """The rows that the mean mask keeps, [G] bool, once a step was taken."""
        logits: Tensor = self.state[self.coefficients]["logits"]
        return logits >= 0

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The closure computes loss and gradient, once."""
        assert closure is not None
        here, options = self.coefficients, self.param_groups[0]
        state = self._started(here)
        tensors = self._of_rows(here)
        mask = sample_concrete(state["logits"], options["temperature"], options["seed"], int(state["count"]))
        values = state["start"] + state["shift"][:, tensors]
        mean = means(mask, tensors)
        scaled = mask / mean
        here.copy_(scaled * values)
        with torch.enable_grad():
            loss = closure()
        assert here.grad is not None
        slopes = here.grad
        shift = torch.zeros_like(state["shift"]).index_add_(1, tensors, scaled * slopes)
        pull = (values * slopes).sum(0)
        logits = (pull - means(pull * scaled, tensors)) / mean * mask * (1 - mask) / options["temperature"]
        state["count"] += 1
        _adam(state, "shift", shift, options["lr"])
        _adam(state, "logits", logits, options["mask_lr"])
        kept = self.kept().to(here)
        settled = kept / means(kept, tensors).clamp_min(1e-12)
        here.copy_(settled * (state["start"] + state["shift"][:, tensors]))
        return loss

    def _started(self, here: Tensor) -> dict[str, Any]:
        """The state, made at the first step."""
        state: dict[str, Any] = self.state[here]
        if not state:
            count = int(self._of_rows(here).max()) + 1
            made = {"shift": here.new_zeros(len(here), count), "logits": here.new_zeros(here.shape[1])}
            state |= {"count": torch.zeros((), dtype=torch.int64), "start": here.clone(), **made}
            for name, tensor in made.items():
                state |= {
                    f"{name}_first": torch.zeros_like(tensor),
                    f"{name}_second": torch.zeros_like(tensor),
                }
        return state

    def _of_rows(self, here: Tensor) -> Tensor:
        if self._tensors is None:
            return torch.zeros(here.shape[1], dtype=torch.int64, device=here.device)
        return self._tensors.to(here.device)


def sample_concrete(logits: Tensor, temperature: float, seed: int, step: int) -> Tensor:
    """m, [G]: a function of seed and step, the same on every device and process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return ((logits + uniform.logit().to(logits)) / temperature).sigmoid()


def means(values: Tensor, tensors: Tensor) -> Tensor:
    """Each row's mean over the rows of its tensor, [G] -> [G]."""
    count = int(tensors.max()) + 1
    sums = values.new_zeros(2, count).index_add_(1, tensors, torch.stack([values, torch.ones_like(values)]))
    return (sums[0] / sums[1].clamp_min(1))[tensors]


def _adam(state: dict[str, Any], name: str, gradient: Tensor, lr: float) -> None:
    """Adam's step of one state tensor."""
    first, second, count = state[f"{name}_first"], state[f"{name}_second"], int(state["count"])
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    root = (second / (1 - BETAS[1] ** count)).sqrt_().add_(EPS)
    state[name] -= lr * (first / (1 - BETAS[0] ** count)) / root
