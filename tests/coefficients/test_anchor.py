"""The pull back to the anchor, in the paper's scale and in the reference code's."""

import pytest
import torch

from trainmerge.coefficients.anchor import Anchor

START = torch.full((3, 4), 0.3)


def test_scales_and_powers() -> None:
    c = START + torch.linspace(-1, 1, 12).view(3, 4)
    mean = (c - START).abs().mean()
    torch.testing.assert_close(Anchor(5.0)(c, START), 5 * mean)
    torch.testing.assert_close(Anchor(5.0, scale="reference")(c, START), 3 * 5 * mean)
    torch.testing.assert_close(Anchor(2.0, power=2)(c, START), 2 * (c - START).square().mean())


def test_an_anchor_an_expert() -> None:
    at = [0.1, 0.3, 0.5]
    want = (START - torch.tensor(at)[:, None]).abs().mean()
    torch.testing.assert_close(Anchor(1.0, at)(START, START), want)
    with pytest.raises(ValueError, match="2 values for 3 experts"):
        Anchor(1.0, [0.1, 0.2])(START, START)


def test_the_reference_code_is_reached_in_two_ways() -> None:
    """It averages the K tasks that a fit sums, and divides the penalty by G: gamma and clip times K."""
    K, G, gamma, clip = 3, 4, 5.0, 1.0
    generator = torch.Generator().manual_seed(0)
    c = (START + torch.randn(K, G, generator=generator)).requires_grad_()
    slopes = torch.randn(K, K, G, generator=generator)  # of K tasks whose losses are linear
    losses = torch.stack([(c * slope).sum() for slope in slopes])

    def clipped(loss: torch.Tensor, most: float) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss, c, retain_graph=True)
        assert gradient.norm() > most
        return gradient * most / gradient.norm()

    reference = clipped(losses.mean() + gamma * (c - START).abs().sum() / G, clip)
    summed = losses.sum() + Anchor(K * gamma, scale="reference")(c, START)
    torch.testing.assert_close(clipped(summed, K * clip), K * reference)
    weighted = (losses / K).sum() + Anchor(gamma, scale="reference")(c, START)
    torch.testing.assert_close(clipped(weighted, clip), reference)
    as_said_before = losses.sum() + Anchor(gamma, scale="reference")(c, START)
    assert (clipped(as_said_before, clip) - reference).norm() > 0.01


def test_it_is_inert_at_the_anchor() -> None:
    c = START.clone().requires_grad_()
    Anchor(1.0)(c, START).backward()
    assert c.grad is not None
    assert not c.grad.any()


def test_it_never_pushes() -> None:
    with pytest.raises(ValueError, match=r"Anchor\.weight must be 0 or more"):
        Anchor(-1.0)
