"""Learned masks: closed gradients against autograd, the mean mask at the end, rows as the cheap form.

Legend: `K` experts, `*S` a parameter's shape.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trainmerge as tm
from trainmerge.model.concrete import Concrete, ConcreteMasks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def experts(count: int = 2) -> dict[str, dict[str, Tensor]]:
    found = {}
    for k in range(count):
        generator = torch.Generator().manual_seed(k + 1)
        found[f"e{k}"] = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in net().state_dict().items()
        }
    return found


def batches() -> dict[str, list[Tensor]]:
    return {f"e{k}": [torch.randn(5, 6, generator=torch.Generator().manual_seed(k + 50))] for k in range(2)}


def test_both_gradients_are_autograd_s() -> None:
    base, own = net(), experts()
    vectors = tm.TaskVectors.from_state_dicts(base.state_dict(), own)
    layout = tm.Grouping().layout(vectors.shapes)
    coefficients = tm.Coefficients(tuple(own), layout, 0.4)
    masks = ConcreteMasks(Concrete(temperature=0.7), vectors.shapes, torch.device("cpu"))
    for name, logits in masks.logits.items():
        logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(name))))
    work = net()
    merged = tm.MergedModel(work, vectors, coefficients, masks=masks)
    merged.materialise()
    inputs = batches()["e0"][0]
    work(inputs).square().sum().backward()
    slopes = merged.gradient()

    values = coefficients().detach().double().requires_grad_()
    wanted = {name: logits.double().requires_grad_() for name, logits in masks.logits.items()}
    state = {}
    for name, start in base.state_dict().items():
        taus = [(expert[name] - start).double() for expert in own.values()]
        change = sum(values[k, layout.groups[name][0]] * tau for k, tau in enumerate(taus))
        noise = (masks.sample(name).double().logit() * 0.7 - masks.logits[name].double()).detach()
        mask = ((wanted[name] + noise) / 0.7).sigmoid()
        state[name] = start.double() + mask / mask.mean() * change
    double = net().double()
    torch.func.functional_call(double, state, (inputs.double(),)).square().sum().backward()
    torch.testing.assert_close(slopes.double(), values.grad, rtol=1e-4, atol=1e-5)
    for name, logits in masks.logits.items():
        torch.testing.assert_close(logits.grad, wanted[name].grad.float(), rtol=1e-3, atol=1e-5)


def test_samples_are_the_paper_s() -> None:
    masks = ConcreteMasks(Concrete(), {"w": torch.Size([200, 200])}, torch.device("cpu"))
    sample = masks.sample("w")
    assert torch.equal(sample, masks.sample("w"))  # drawn again, the same
    assert float(sample.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(((sample > 0.1) & (sample < 0.9)).float().mean()) == pytest.approx(0.5, abs=0.02)
    masks.step()
    assert not torch.equal(sample, masks.sample("w"))


def test_the_result_has_the_mean_mask_cut() -> None:
    base, own = net(), experts()
    settings = {"steps": 40, "initial": 0.5, "masks": tm.Concrete(lr=0.2)}
    fitted = tm.fit_module(base, own, batches(), tm.Alignment(hidden=0), **settings)  # type: ignore[arg-type]
    again = tm.fit_module(base, own, batches(), tm.Alignment(hidden=0), **settings)  # type: ignore[arg-type]
    values, state = fitted.coefficients().detach(), fitted.module.state_dict()
    dropped = 0
    for name, start in base.state_dict().items():
        column = fitted.coefficients.layout.groups[name][0]
        change = sum(values[k, column] * (expert[name] - start) for k, expert in enumerate(own.values()))
        mask = fitted.masks[name].float()
        torch.testing.assert_close(state[name], start + mask / mask.mean() * change, rtol=1e-5, atol=1e-6)
        assert torch.equal(state[name], again.module.state_dict()[name])
        dropped += int((mask == 0).sum())
    assert dropped > 5
    first, last = fitted.losses[0], fitted.losses[-1]
    assert sum(last.values()) < sum(first.values())


def test_rows_are_chunks() -> None:
    """The cheap form: more chunks than rows is one coefficient per row."""
    fitted = tm.fit_module(
        net(),
        experts(),
        batches(),
        tm.Alignment(hidden=0),
        steps=1,
        grouping=tm.Grouping("chunk", chunks=1000),
    )
    assert {name: len(groups) for name, groups in fitted.coefficients.layout.groups.items()} == {
        "0.weight": 8, "0.bias": 8, "2.weight": 3, "2.bias": 3,
    }  # fmt: skip


def test_masks_are_refused_where_they_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out run and combine"):
        tm.fit_module(
            net(),
            experts(),
            batches(),
            tm.Alignment(hidden=0),
            steps=1,
            masks=tm.Concrete(),
            run=str(tmp_path),
        )
