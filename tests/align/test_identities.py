"""What keeps the function, family by family, and that a twin is put back in place."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.align.twins import FAMILIES, change_by, locks, model, shuffles, spaces, under, weights
from trainmerge.align import (
    AttentionHeads,
    Gauge,
    Neurons,
    NeuronScales,
    Pair,
    ResidualStream,
    align,
    anatomy,
)
from trainmerge.align.families import STREAM
from trainmerge.align.gauge import rotation_and_scale, unlock
from trainmerge.align.scales import distances, nearest_scales
from trainmerge.align.unit_map import UnitMap

KEPT = 1e-9  # float64 through two layers; matrices of a condition below 1e3
KEPT_32 = 1e-5  # norms that compute in float32
EVERY = [ResidualStream(), AttentionHeads(), Neurons(), Gauge()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", ["neurons", "heads", "stream"])
def test_permutations_keep_the_function(family: str, kinds: str) -> None:
    module = model(family)
    moved = under(module, shuffles(module, kinds))
    assert change_by(module, moved) < (KEPT_32 if kinds == "stream" else KEPT)
    own = weights(module)
    assert any(not torch.equal(moved[name], own[name]) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_gauges_keep_the_function(family: str) -> None:
    module = model(family)
    assert change_by(module, under(module, locks(module, "value"))) < KEPT
    query = change_by(module, under(module, locks(module, "query")))
    assert query < KEPT if spaces(module).gauges != "none" else query > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_rotary_positions_do_not_permit(family: str) -> None:
    module = model(family)
    assert change_by(module, under(module, locks(module, "query", free=True))) > 1e-2
    across = torch.tensor([2, 1, 0, 3])  # query heads of two groups
    maps = {f"{own} {kind}": UnitMap(across) for own in spaces(module).layers for kind in ("query", "output")}
    assert change_by(module, under(module, maps)) > 1e-2


def nudged(own: dict[str, Tensor], scale: float = 0.02) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(11)
    return {
        name: value + scale * torch.randn(value.shape, generator=dice, dtype=value.dtype)
        for name, value in own.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shuffled_twin_is_put_back_bit_for_bit(family: str) -> None:
    module = model(family)
    base, expert = weights(module), nudged(weights(module))
    module.load_state_dict(expert, strict=False)
    shuffled = under(module, shuffles(module, "neurons heads stream"))
    found = align(Pair(spaces(module), base.__getitem__, shuffled.__getitem__), EVERY)
    assert found.after < found.before / 4
    for name in expert:
        assert torch.equal(found.pair.aligned(name), expert[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_locked_expert_is_unlocked(family: str) -> None:
    module = model(family)
    base, expert = weights(module), nudged(weights(module), 0.005)
    module.load_state_dict(expert, strict=False)
    kinds = "value" if spaces(module).gauges == "none" else "query value"
    locked = under(module, locks(module, kinds))
    found = align(Pair(spaces(module), base.__getitem__, locked.__getitem__), [Gauge()])
    assert found.gauges == 2 * len(kinds.split())
    back = {name: found.pair.aligned(name) for name in expert}
    module.load_state_dict(locked, strict=False)
    assert change_by(module, back) < KEPT  # the same function

    def distance(one: dict[str, Tensor]) -> float:
        return sum(float((one[name] - expert[name]).square().sum()) for name in expert) ** 0.5

    assert distance(back) < 0.02 * distance(locked)


GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]


def neuron_scales(module: PreTrainedModel, seed: int = 5) -> dict[str, UnitMap]:
    """Random scales between 1/4 and 4 of every neuron's up and down."""
    dice, maps = torch.Generator().manual_seed(seed), {}
    for layer in spaces(module).layers:
        scales = 4 ** (2 * torch.rand(24, 1, 1, generator=dice, dtype=torch.float64) - 1)
        maps |= {f"{layer} up": UnitMap(torch.arange(24), scales)}
        maps |= {f"{layer} down": UnitMap(torch.arange(24), 1 / scales)}
    return maps


@pytest.mark.parametrize("family", GATED)
def test_scales_of_neurons_are_undone(family: str) -> None:
    module = model(family)
    base, expert = weights(module), nudged(weights(module), 0.005)
    module.load_state_dict(expert, strict=False)
    scaled = under(module, neuron_scales(module))
    assert change_by(module, scaled) < KEPT  # the same function
    found = align(Pair(spaces(module), base.__getitem__, scaled.__getitem__), [NeuronScales()])
    assert found.gauges == 2  # both layers
    assert found.after < 1.1 * Pair(spaces(module), base.__getitem__, expert.__getitem__).distance()
    assert found.after < 0.1 * found.before
    same = align(Pair(spaces(module), base.__getitem__, expert.__getitem__), [NeuronScales()])
    assert same.is_identity
    shuffled = under(module, neuron_scales(module) | shuffles(module, "neurons"))
    both = align(Pair(spaces(module), base.__getitem__, shuffled.__getitem__), [Neurons(), NeuronScales()])
    assert both.after < 0.1 * both.before


def test_scales_are_for_gated_layers_only() -> None:
    module = model("bert")
    base, expert = weights(module), nudged(weights(module), 0.5)
    assert align(Pair(spaces(module), base.__getitem__, expert.__getitem__), [NeuronScales(True)]).is_identity


def test_the_nearest_scale_is_a_minimum() -> None:
    dice = torch.Generator().manual_seed(2)
    up, up0, down, down0 = (torch.randn(40, 6, generator=dice, dtype=torch.float64) for _ in range(4))
    up0[:20], down0[:20] = 3 * up[:20], down[:20] / 3
    best = nearest_scales(up, up0, down, down0)
    torch.testing.assert_close(best[:20], torch.full((20,), 3.0, dtype=torch.float64))
    least = distances(best, up, up0, down, down0)
    for s in torch.logspace(-3, 3, 200, dtype=torch.float64):
        assert (distances(s.expand(40), up, up0, down, down0) >= least - 1e-9 * least.abs()).all()


def test_a_locked_and_shuffled_expert() -> None:
    module = model("bert")
    base, expert = weights(module), nudged(weights(module), 0.005)
    module.load_state_dict(under(module, locks(module, "query value")), strict=False)
    both = under(module, shuffles(module, "heads neurons stream"))
    found = align(Pair(spaces(module), base.__getitem__, both.__getitem__), EVERY)
    assert found.after < 0.02 * found.before
    assert found.gauges == 4
    assert expert.keys() == base.keys()


def test_the_identity_is_found_for_a_fine_tuned_expert() -> None:
    module = model("llama")
    base, expert = weights(module), nudged(weights(module), 0.05)
    found = align(Pair(spaces(module), base.__getitem__, expert.__getitem__), EVERY)
    assert found.is_identity
    assert found.before == found.after
    assert not found.pair.changed


def test_maps_compose() -> None:
    dice = torch.Generator().manual_seed(0)

    def random() -> UnitMap:
        order = torch.randperm(3, generator=dice)
        return UnitMap(order, torch.randn(3, 2, 2, generator=dice, dtype=torch.float64))

    tensor = torch.randn(5, 6, generator=dice, dtype=torch.float64)
    touch = next(iter([t for _, t in spaces(model("bert")).touching(STREAM) if t.axis == 1]))
    first, second = random(), random()
    expected = second(first(tensor, touch), touch)
    torch.testing.assert_close(first.then(second)(tensor, touch), expected)
    plain = UnitMap(first.order)
    torch.testing.assert_close(plain.then(second)(tensor, touch), second(plain(tensor, touch), touch))


def test_an_unknown_family_and_an_unknown_tensor_are_named() -> None:
    module = model("bert")
    config = module.config.to_dict()
    with pytest.raises(ValueError, match="'mamba'; it covers llama"):
        anatomy({**config, "model_type": "mamba"}, [])
    with pytest.raises(ValueError, match=r"further\.weight"):
        anatomy(config, [*weights(module), "further.weight"])


@pytest.mark.parametrize("rotary", [False, True])
def test_the_gauge_is_a_minimum(rotary: bool) -> None:
    """The gradient of the distance vanishes, and a known gauge of an exact copy is found."""
    dice = torch.Generator().manual_seed(2)
    G, d, D = 2, 6, 30

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    q0, k0 = random(G, d, 2 * D), random(G, d, D)
    numbers = torch.complex(random(G, d // 2), random(G, d // 2))
    lock = rotation_and_scale(numbers) if rotary else random(G, d, d)
    exact = unlock(lock @ q0, q0, torch.linalg.inv(lock).mT @ k0, k0, rotary)
    torch.testing.assert_close(exact @ lock, torch.eye(d, dtype=torch.float64).repeat(G, 1, 1))
    q, k = lock @ (q0 + 0.05 * random(G, d, 2 * D)), torch.linalg.inv(lock).mT @ (k0 + 0.05 * random(G, d, D))
    found = unlock(q, q0, k, k0, rotary)

    def distance(more: Tensor) -> Tensor:
        B = (rotation_and_scale(more) if rotary else more) @ found
        return (B @ q - q0).square().sum() + (torch.linalg.inv(B).mT @ k - k0).square().sum()

    start = torch.ones_like(numbers) if rotary else torch.eye(d, dtype=torch.float64).repeat(G, 1, 1)
    best = distance(start)
    for _ in range(20):
        noise = torch.complex(random(G, d // 2), random(G, d // 2)) if rotary else random(G, d, d)
        assert distance(start + 1e-2 * noise) > best
