"""Masks over rows: closed gradients against autograd, the mean mask between steps, and a resumed fit.

Legend: `K` experts, `G` rows, `N` tensors.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trainmerge as tm
from tests.coefficients.optimised import fitted
from tests.world import recipe, write_world
from trainmerge.coefficients.concrete_rows import ConcreteRows, sample_concrete

GROUPS = {"a": (0, 1, 2, 3), "b": (4, 5, 6)}
K, G = 3, 7


def coefficients() -> tm.Coefficients:
    labels = tuple(f"{name}[{i}]" for name, own in GROUPS.items() for i in range(len(own)))
    made = tm.Coefficients(("x", "y", "z"), tm.Layout(labels, GROUPS), 0.4)
    made.raw.data = torch.full((K, G), 0.4, dtype=torch.float64)
    return made


def take(optimizer: ConcreteRows, parameter: nn.Parameter, target: Tensor) -> list[Tensor]:
    """One step towards a target; the coefficients at which the loss was computed."""
    seen = []

    def closure() -> Tensor:
        seen.append(parameter.detach().clone())
        optimizer.zero_grad()
        loss = (parameter - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return seen


def test_both_gradients_are_autograd_s(generator: torch.Generator) -> None:
    """Adam's first step moves by its rate against the sign; its first moment is a tenth of the gradient."""
    own = coefficients()
    optimizer = ConcreteRows([own.raw], temperature=0.7, seed=3)
    ConcreteRows.follow(optimizer, own)
    target = torch.randn(K, G, dtype=torch.float64, generator=generator)
    (at,) = take(optimizer, own.raw, target)

    logits = torch.zeros(G, dtype=torch.float64, requires_grad=True)
    shared = torch.full((K, 2), 0.4, dtype=torch.float64, requires_grad=True)
    noise = sample_concrete(torch.zeros(G, dtype=torch.float64), 0.7, 3, 0).logit() * 0.7
    mask = ((logits + noise) / 0.7).sigmoid()
    parts = [
        mask[list(rows)] / mask[list(rows)].mean() * shared[:, n, None]
        for n, rows in enumerate(GROUPS.values())
    ]
    values = torch.cat(parts, dim=1)
    (values - target).square().sum().backward()
    torch.testing.assert_close(at, values.detach(), rtol=1e-10, atol=1e-12)
    state = optimizer.state[own.raw]
    assert shared.grad is not None
    assert logits.grad is not None
    torch.testing.assert_close(state["shift_first"] * 10, shared.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(state["logits_first"] * 10, logits.grad, rtol=1e-8, atol=1e-10)


def test_between_steps_the_mask_is_the_mean_one() -> None:
    own = coefficients()
    optimizer = ConcreteRows([own.raw], lr=0.02, mask_lr=0.3)
    ConcreteRows.follow(optimizer, own)
    target = torch.cat([torch.full((K, 2), 1.0), torch.full((K, 2), -1.0), torch.ones(K, 3)], dim=1).double()
    before = float((own.raw.detach() - target).square().sum())
    for _ in range(30):
        take(optimizer, own.raw, target)
    kept, state = optimizer.kept(), optimizer.state[own.raw]
    assert kept.tolist() == [True, True, False, False, True, True, True]
    values = (0.4 + state["shift"])[:, [0, 0, 0, 0, 1, 1, 1]]
    scaled = torch.tensor([2.0, 2.0, 0, 0, 1, 1, 1], dtype=torch.float64)  # kept / mean of the tensor's
    torch.testing.assert_close(own.raw.detach(), scaled * values, rtol=1e-12, atol=0)
    assert float((own.raw.detach() - target).square().sum()) < before


def test_no_rate_changes_nothing() -> None:
    own = coefficients()
    optimizer = ConcreteRows([own.raw], lr=0.0, mask_lr=0.0)
    ConcreteRows.follow(optimizer, own)
    take(optimizer, own.raw, torch.ones(K, G, dtype=torch.float64))
    torch.testing.assert_close(own.raw.detach(), torch.full((K, G), 0.4).double(), rtol=1e-6, atol=0)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="single tensor"):
        ConcreteRows([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))])
    whole = tm.Coefficients(("x",), tm.Layout(("a",), {"a": (0,)}), 0.4)
    with pytest.raises(ValueError, match="granularity: chunk"):
        ConcreteRows.follow(ConcreteRows([whole.raw]), whole)
    bound = tm.Coefficients(("x", "y", "z"), coefficients().layout, 0.4, tm.Sigmoid())
    with pytest.raises(ValueError, match="leaves Sigmoid"):
        ConcreteRows.follow(ConcreteRows([bound.raw]), bound)


def test_a_resumed_fit_continues_bit_for_bit_and_exports_the_mean_mask(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path, grouping=tm.Grouping("chunk", chunks=100_000))
    whole = fitted(merge, tmp_path / "whole", partial(ConcreteRows, mask_lr=0.5), 4)
    assert torch.equal(fitted(merge, tmp_path / "parts", partial(ConcreteRows, mask_lr=0.5), 2, 4), whole)
    cut = (whole == 0).all(0)
    assert 0 < int(cut.sum()) < whole.shape[1]
    out = tm.export_run(tmp_path / "whole", tmp_path / "out")
    base, merged = (tm.load_state_dict(folder / "model.safetensors") for folder in (Path(merge.base), out))
    layout = tm.load_coefficients(tmp_path / "whole/coefficients.safetensors").layout
    checked = 0
    for name, groups in layout.groups.items():
        if len(groups) == len(base[name]):
            rows = cut[list(groups)]
            assert torch.equal(merged[name][rows], base[name][rows])
            checked += int(rows.sum())
    assert checked > 0
