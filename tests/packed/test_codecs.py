"""Every codec against its closed form: what is exact, what no scale improves, and bits per weight.

Legend: `K` tasks, `R` rows, `W` entries of a row.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainmerge.kernels import Difference, LowRank, Term, Untouched
from trainmerge.packed import parameter as parameters
from trainmerge.packed.bits import pack_bits, pack_trits, unpack_bits, unpack_trits
from trainmerge.packed.codec import Codec, EncodedParameter, decode, errors
from trainmerge.packed.low_rank import Dense
from trainmerge.packed.low_rank import LowRankCodec as Factored
from trainmerge.packed.parameter import Parameter
from trainmerge.packed.pca import Pca
from trainmerge.packed.ternary import Signs, magnitude_threshold
from trainmerge.packed.unified import Emr, Mask, Shared
from trainmerge.task_vectors.changes import Change
from trainmerge.task_vectors.delta import Delta

SHAPES = [(), (7,), (50, 13), (4, 3, 5), (131, 3)]
CODECS = [Mask(), Emr(), Shared(), Factored(rank=2), Factored(shared=0.3), Signs(), Pca(), Dense()]


def heavy(shape: Sequence[int], seed: int) -> Tensor:
    """Heavy-tailed numbers."""
    generator = torch.Generator().manual_seed(seed)
    return 1e-3 * torch.randn(tuple(shape), generator=generator).pow(3)


def parameter_of(taus: Sequence[Tensor | Term]) -> Parameter:
    terms = tuple(
        Difference(tau) if isinstance(tau, Tensor) and not isinstance(tau, tuple) else tau for tau in taus
    )
    shape = next(tau.shape for tau in taus if isinstance(tau, Tensor))
    return Parameter("w", Delta(torch.randn(shape, generator=torch.Generator().manual_seed(9)), terms))  # type: ignore[arg-type]


def heavy_parameter(shape: Sequence[int], tasks: int = 4) -> Parameter:
    return parameter_of([heavy(shape, seed) for seed in range(tasks)])


def back(parameter: Parameter, made: EncodedParameter, task: int) -> Tensor:
    """A task's difference, [R, W]."""
    found = [
        decode(made.shared, made.own[task], float(made.scales[task]), parameter.shape, part)
        for part in parameters.blocks(parameter.shape)
    ]
    return torch.cat(found)


def squared(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


def test_bits_and_trits_come_back() -> None:
    mask = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_bits(mask)
    assert len(packed) == 126
    assert torch.equal(unpack_bits(packed, 0, 1003), mask)
    assert torch.equal(unpack_bits(packed, 40, 11), mask[40:51])
    assert (
        int(pack_bits(torch.tensor([True] + 7 * [False]))[0]) == 1
    )  # little: the first entry is the lowest bit
    signs = torch.randint(-1, 2, (1003,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert len(pack_trits(signs)) == 201
    assert torch.equal(unpack_trits(pack_trits(signs), 0, 1003), signs)
    assert torch.equal(unpack_trits(pack_trits(signs), 40, 13), signs[40:53])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{type(codec).__name__}")
def test_blocks_change_nothing_and_errors_are_measured(
    codec: Codec, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = heavy_parameter(shape)
    whole = codec.encode(parameter)
    backs = [back(parameter, whole, task) for task in range(4)]
    for task, found in enumerate(backs):
        want = squared(found, parameter.tau(task))
        assert float(errors(parameter, whole)[task]) == pytest.approx(want, rel=1e-9)
        assert want <= 1.0001 * float(parameter.squares()[task])  # no worse than the base
    monkeypatch.setattr(parameters, "BLOCK", 1)
    pieces = codec.encode(parameter)
    for task, found in enumerate(backs):
        torch.testing.assert_close(back(parameter, pieces, task), found, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("codec", [Mask(), Mask(threshold=0.4), Emr()], ids=repr)
def test_disjoint_tasks_and_a_single_one_are_exact(codec: Codec) -> None:
    exact = replace(codec, dtype=torch.float32)
    taus = [torch.zeros(4, 60) for _ in range(3)]
    for task, tau in enumerate(taus):
        tau[:, task::3] = heavy((4, 20), task)
    for some in (taus, taus[:1], [heavy((5, 7), 3)]):
        parameter = parameter_of(some)
        made = exact.encode(parameter)
        for task, tau in enumerate(some):
            torch.testing.assert_close(back(parameter, made, task), tau, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6, 1.0])
def test_no_other_scale_of_a_mask_has_a_smaller_error(threshold: float) -> None:
    parameter = heavy_parameter((40, 25))
    made = Mask(threshold=threshold, dtype=torch.float32).encode(parameter)
    u = sum(parameter.tau(task) for task in range(4))
    for task in range(4):
        tau = parameter.tau(task)
        mask = tau.abs() > threshold * (u - tau).abs()
        ours = squared(back(parameter, made, task), tau)
        for scale in (1.0, float(made.scales[task]) * 0.99, float(made.scales[task]) * 1.01):
            assert ours <= squared(scale * mask * u, tau)
        assert ours < squared(mask * u, tau)  # the paper's: 1


def test_the_mask_of_threshold_one_is_the_best() -> None:
    parameter = heavy_parameter((30, 20))
    u = sum(parameter.tau(task) for task in range(4))
    assert isinstance(u, Tensor)
    tau = parameter.tau(0)
    best = squared((tau.abs() > (u - tau).abs()) * u, tau)
    entries = torch.minimum(tau.square(), (u - tau).square())  # each entry is kept or not
    assert best == pytest.approx(float(entries.double().sum()), rel=1e-5)


def test_masks_do_not_depend_on_the_size_of_the_merge() -> None:
    parameter = heavy_parameter((60, 50))
    lost = []
    for coefficient in (0.2, 0.4, 1.0):
        merge = Change("w", parameter.whole, torch.full((4, 1), coefficient))
        made = Mask(dtype=torch.float32).encode(replace(parameter, change=merge))
        lost.append(float(errors(parameter, made).sum() / parameter.squares().sum()))
        first = Mask(threshold=1 - 1e-9, dtype=torch.float32).encode(replace(parameter, change=merge))
        assert lost[-1] <= float(errors(parameter, first).sum() / parameter.squares().sum())  # one turn
    assert max(lost) < 1.05 * min(lost)


def test_emr_elects_as_the_paper_and_scales_better() -> None:
    parameter = heavy_parameter((40, 25))
    made = Emr(dtype=torch.float32).encode(parameter)
    taus = torch.stack([parameter.tau(task) for task in range(4)])
    sign = taus.sum(dim=0).sign()
    agree = taus * sign > 0
    assert torch.equal(made.shared["u"], sign * torch.where(agree, taus.abs(), 0).amax(dim=0))
    for task, tau in enumerate(taus):
        masked = agree[task] * made.shared["u"]
        published = tau.abs().sum() / masked.abs().sum()  # sums, over this one tensor
        assert squared(back(parameter, made, task), tau) < squared(published * masked, tau)


def test_opposed_tasks_have_no_elected_sign() -> None:
    tau = torch.tensor([[1.0, -2.0, 3.0]])
    made = Emr().encode(parameter_of([tau, -tau]))
    assert not made.shared["u"].any()
    assert made.own == ({}, {})
    assert not made.scales.any()


def test_signs_keep_the_best_share_and_scale() -> None:
    tau = heavy((15, 14), 5)
    ordered = tau.abs().flatten().sort(descending=True).values.double()
    numbers = range(1, len(ordered) + 1)
    least = min(float(ordered.square().sum() - ordered[:n].sum().square() / n) for n in numbers)
    parameter = parameter_of([tau])
    assert squared(back(parameter, Signs().encode(parameter), 0), tau) == pytest.approx(least, rel=1e-5)
    for share in (0.05, 0.1, 0.2, 0.5):
        made = Signs(share=share).encode(parameter)
        ours = squared(back(parameter, made, 0), tau)
        signs = back(parameter, made, 0).sign()
        assert int(signs.abs().sum()) == pytest.approx(share * 210, abs=1)
        for alpha in (0.5, 1.0, 2.0, 4.0):  # ComPEFT's scale
            assert ours <= squared(alpha * tau.std() * signs, tau)


def test_ties_and_zeros_of_signs() -> None:
    assert magnitude_threshold(torch.zeros(5), None) == (float("inf"), 0.0)
    assert magnitude_threshold(torch.tensor([2.0, 2.0, 0.0, 0.0]), None) == (2.0, 2.0)
    assert magnitude_threshold(torch.tensor([2.0, 2.0, 2.0, 0.0]), 0.25) == (
        2.0,
        2.0,
    )  # all of equal magnitude
    assert magnitude_threshold(torch.tensor([2.0, 1.0, 0.0, 0.0]), 1.0) == (1.0, 1.5)  # zeros are not kept


def test_factors_of_adapters_are_exact_and_others_lack_the_tail() -> None:
    up, down = heavy((30, 3), 0), heavy((3, 20), 1)
    lora: Term = LowRank(up, down, 2.0)
    dense = heavy((30, 20), 2)
    parameter = Parameter("w", Delta(torch.zeros(30, 20), (lora, Difference(dense), Untouched())))
    made = Factored(rank=4, dtype=torch.float32).encode(parameter)
    torch.testing.assert_close(back(parameter, made, 0), 2.0 * up @ down, rtol=1e-4, atol=1e-12)
    tail = float(torch.linalg.svdvals(dense.double())[4:].square().sum())
    assert squared(back(parameter, made, 1), dense) == pytest.approx(tail, rel=1e-4)
    assert made.own[2] == {}
    assert not back(parameter, made, 2).any()
    assert made.own[0]["U"].shape == (30, 3)


def test_a_shared_part_is_taken_where_it_lowers_the_error_only() -> None:
    common = heavy((30, 20), 7)
    own = [heavy((30, 1), k) @ heavy((1, 20), k + 10) * 1e3 for k in range(4)]
    alike, apart = parameter_of([common + one for one in own]), parameter_of(own)
    twin = Factored(rank=4, shared=0.25, dtype=torch.float32)
    made = twin.encode(alike)  # tau_t - mean has rank 4
    for task in range(4):
        torch.testing.assert_close(back(alike, made, task), alike.tau(task), rtol=1e-3, atol=1e-8)
    assert set(twin.encode(apart).shared) == set()  # of rank 1 without it
    assert "s" in made.shared


@pytest.mark.parametrize("tasks", [2, 4])
def test_all_components_are_exact_and_fewer_are_least_squares(tasks: int) -> None:
    parameter = heavy_parameter((20, 15), tasks)
    exact = Pca(components=tasks - 1, dtype=torch.float32).encode(parameter)
    taus = torch.stack([parameter.tau(task) for task in range(tasks)])
    for task, tau in enumerate(taus):
        torch.testing.assert_close(back(parameter, exact, task), tau, rtol=1e-4, atol=1e-7)
    if tasks > 2:
        made = Pca(dtype=torch.float32).encode(parameter)
        flat, mean = taus.flatten(1).double(), taus.flatten(1).double().mean(dim=0)
        published = float(torch.linalg.svdvals(flat - mean)[1:].square().sum())  # the mean's weight is 1
        basis = made.shared["b"].flatten(1).double().T
        solved = torch.linalg.lstsq(basis, flat.T).solution
        ours = sum(squared(back(parameter, made, task), tau) for task, tau in enumerate(taus))
        assert ours <= published * (1 + 1e-6)
        assert ours == pytest.approx(float((basis @ solved - flat.T).square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (Mask(), 1 + 16 / 4), (Emr(), 1 + 16 / 4), (Shared(), 16 / 4), (Signs(), 1.6), (Dense(), 16),
        (Factored(), 16 * (80 + 120) * 20 / (80 * 120)), (Factored(rank=5), 16 * (80 + 120) * 5 / (80 * 120)),
        (Pca(), 16 * 2 / 4), (Pca(components=2), 16 * 3 / 4),
    ],
    ids=repr,
)  # fmt: skip
def test_bits_per_weight_are_the_table_s(codec: Codec, bits: float) -> None:
    parameter = heavy_parameter((80, 120))
    count = 4 * 80 * 120
    found = 8 * codec.encode(parameter).nbytes / count
    assert bits <= found <= bits + 8 * 16 * 4 / count  # scales and coordinates: at most four a task


def test_a_task_that_changes_nothing_costs_a_scale() -> None:
    tau = heavy((16, 8), 0)
    parameter = Parameter("w", Delta(torch.zeros(16, 8), (Difference(tau), Untouched())))
    for codec in (Mask(), Emr(), Signs(), Factored(), Dense()):
        made = codec.encode(parameter)
        assert made.own[1] == {}
        assert not back(parameter, made, 1).any()


def test_alike_experts_keep_their_mask_whatever_the_size_of_u() -> None:
    """Of eight nearly equal experts the sum is eight times each: the mask at scale 1 keeps nothing."""
    dice = torch.Generator().manual_seed(3)
    common = torch.randn(40, 25, generator=dice)
    taus = [common + 0.05 * torch.randn(40, 25, generator=dice) for _ in range(8)]
    parameter = parameter_of(taus)
    made = Mask(dtype=torch.float32).encode(parameter)
    for task, tau in enumerate(taus):
        assert squared(back(parameter, made, task), tau) < 0.01 * squared(torch.zeros_like(tau), tau)
