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


def test_it_is_inert_at_the_anchor() -> None:
    c = START.clone().requires_grad_()
    Anchor(1.0)(c, START).backward()
    assert c.grad is not None
    assert not c.grad.any()


def test_it_never_pushes() -> None:
    with pytest.raises(ValueError, match=r"Anchor\.weight must be 0 or more"):
        Anchor(-1.0)
