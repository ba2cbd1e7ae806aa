"""Merges written just before their use: the same bits, whatever reads a weight, and beside the forwards."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.contracts import assert_same_bits
from tests.stand_in import CountedLink, behind
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import Difference, ExpertWeight
from trainmerge.model import merged_weights
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.postponed import by_unit, grouped


class Net(nn.Module):
    """Blocks of two layers; `uses` says how a forward reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.uses = "calls"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.embed(ids)
        for block in self.blocks:
            if self.uses == "reads":
                x = (x @ block[0].weight.T + block[0].bias).tanh()
            elif self.uses == "recomputes":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.uses == "calls" or block is not self.blocks[1]:
                x = block(x)
        return self.norm(x) @ self.head.weight.T


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> CountedLink:
    made = CountedLink()
    monkeypatch.setattr(merged_weights, "link_to", behind(made))
    return made


def merged_net(random_task_vectors, module: nn.Module) -> MergedModel:
    vectors = random_task_vectors(module, [ExpertWeight, Difference])
    layout = Grouping().layout(vectors.shapes)
    return MergedModel(module, vectors, Coefficients(vectors.experts, layout, 0.3))


def test_units_in_the_order_of_their_first_names() -> None:
    net = Net()
    unit_of = by_unit(net, dict(net.named_parameters()))
    assert unit_of["blocks.1.0.bias"] is net.blocks[1]
    assert unit_of["head.weight"] is net.head
    assert "norm.weight" not in unit_of
    outside, groups = grouped(["blocks.1.0.bias", "norm.bias", "embed.weight", "blocks.1.0.weight"], unit_of)
    assert outside == ["norm.bias"]
    assert [*groups] == [net.blocks[1], net.embed]
    assert groups[net.blocks[1]] == ["blocks.1.0.bias", "blocks.1.0.weight"]
    net.blocks[0]._compiled_call_impl = net.blocks[0]._call_impl  # as `compile` leaves it
    assert by_unit(net, dict(net.named_parameters())) == {}  # a compiled part's reads are not seen


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("uses", ["calls", "reads", "recomputes", "skips"])
def test_the_same_bits_however_weights_are_read(uses: str, random_task_vectors) -> None:
    torch.manual_seed(0)
    net = Net()
    merged, ids = merged_net(random_task_vectors, net), torch.arange(6)
    net.uses = uses

    def gradient(together: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        for own in net.parameters():
            own.data.fill_(float("nan"))  # read before its merge, it would stay
        if together:
            merged.materialise()
            loss = net(ids).square().sum()
        else:
            with merged.merging():
                loss = net(ids).square().sum()
        loss.backward()
        return loss.detach(), merged.gradient(), [own.detach().clone() for own in net.parameters()]

    want_loss, want, weights = gradient(together=True)
    assert bool(want_loss.isfinite())
    for _ in range(2):
        loss, got, found = gradient(together=False)
        assert_same_bits(loss, want_loss)
        assert_same_bits(got, want)
        for own, expected in zip(found, weights, strict=True):
            assert_same_bits(own, expected)


def test_a_block_is_sent_while_the_one_before_computes(random_task_vectors, link: CountedLink) -> None:
    net = Net()
    merged, sent = merged_net(random_task_vectors, net), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda *_: sent.append(link.arrivals))
    with merged.merging():
        net(torch.arange(6))
    assert len(sent) == 3
    assert sent[0] < sent[1] < sent[2] < link.arrivals  # the head's comes after the blocks'


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_language_model_under_autocast(recompute: bool, tiny_llama, random_task_vectors) -> None:
    """Casts are shared within a forward, and made anew after each merge."""
    merged, ids = merged_net(random_task_vectors, tiny_llama), torch.arange(8)[None]
    if recompute:
        recompute_blocks(tiny_llama)

    def steps(postponed: bool) -> Iterator[torch.Tensor]:
        merged.coefficients.reset_(torch.full_like(merged.coefficients.raw, 0.3))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                if postponed:
                    with merged.merging():
                        logits = tiny_llama(ids).logits
                else:
                    merged.materialise()
                    logits = tiny_llama(ids).logits
            logits.float().logsumexp(-1).sum().backward()
            gradient = merged.gradient()
            yield gradient
            merged.coefficients.reset_(merged.coefficients.raw.detach() - 0.1 * gradient.sign())

    for got, want in zip([*steps(True)], [*steps(False)], strict=True):
        assert_same_bits(got, want)
