"""TIES against its hand example, a plain reference, and the properties that any scale or order must keep."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainmerge.kernels import Difference, LowRank
from trainmerge.preprocess import Ties, apply
from trainmerge.task_vectors.delta import Delta, TaskVectors


def task_vectors(*parameters: Tensor) -> TaskVectors:
    """Parameters of K given differences, [K, *S] each."""
    experts = tuple(f"e{k}" for k in range(len(parameters[0])))
    deltas = {
        f"p{i}": Delta(torch.zeros_like(taus[0]), tuple(Difference(tau) for tau in taus))
        for i, taus in enumerate(parameters)
    }
    return TaskVectors(experts, deltas)


def run(method: Ties, *parameters: Tensor) -> list[Tensor]:
    return [taus for _, taus in method(task_vectors(*parameters))]


def reference(flat: Tensor, density: float, merge: str) -> Tensor:
    """The paper's three steps on one flat [K, n] matrix without equal magnitudes."""
    kept = int(density * flat.shape[1] + 1e-6)
    below = flat.abs().argsort(dim=1)[:, : flat.shape[1] - kept]
    trimmed = flat.scatter(1, below, 0.0)
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0.0)
    return agreeing / (agreeing != 0).sum(0).clamp(min=1) if merge == "mean" else agreeing


def test_hand_example() -> None:
    taus = torch.tensor([[1.0, -4, 0, 2], [2, 1, 0, -2], [-1, 1, 3, 0]])
    (mean,) = run(Ties(density=1.0, merge="mean"), taus)
    assert mean.sum(0).tolist() == [1.5, -4, 3, 2]  # the tie 2 - 2 takes the majority's sign, +
    (total,) = run(Ties(density=1.0, merge="sum"), taus)
    assert total.sum(0).tolist() == [3, -4, 3, 2]


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.29, 0.5, 1.0])
def test_global_trim_equals_reference_on_the_flat_vector(density: float, merge: str) -> None:
    torch.manual_seed(0)
    shapes = [(40, 7), (13,), (1,), (9, 3, 2)]
    parameters = [torch.randn(3, *shape) * 10.0 ** (i - 2) for i, shape in enumerate(shapes)]
    got = run(Ties(density, "global", merge), *parameters)
    want = reference(torch.cat([p.flatten(1) for p in parameters], dim=1), density, merge)
    torch.testing.assert_close(torch.cat([g.flatten(1) for g in got], dim=1), want, rtol=0, atol=0)


def test_parameter_scope_trims_each_by_itself() -> None:
    torch.manual_seed(1)
    small, large = torch.randn(2, 50) * 1e-4, torch.randn(2, 80)
    got = run(Ties(0.2, "parameter"), small, large)
    for taus, result in zip((small, large), got, strict=True):
        torch.testing.assert_close(result, reference(taus, 0.2, "sum"), rtol=0, atol=0)
    (emptied, _) = run(Ties(0.2, "global"), small, large)
    assert not emptied.any()  # a global ranking wipes out a tensor of small changes


@pytest.mark.parametrize("size", [1, 7, 64, 99, 100, 4096])
@pytest.mark.parametrize("equal", [True, False])
def test_density_is_exact(size: int, equal: bool) -> None:
    torch.manual_seed(size)
    tau = torch.full((1, size), 0.5) if equal else torch.randn(1, size)
    for density in (0.2, 0.29, 1.0):
        for scope in ("global", "parameter"):
            (kept,) = run(Ties(density, scope), tau)
            assert int((kept != 0).sum()) == max(1, int(density * size + 1e-6))
            assert torch.equal(kept[kept != 0], tau[kept != 0])


def test_properties() -> None:
    torch.manual_seed(2)
    taus = torch.randn(4, 300)
    (result,) = run(Ties(0.3), taus)
    (scaled,) = run(Ties(0.3), taus * 8)
    assert torch.equal(scaled, result * 8)
    order = torch.tensor([2, 0, 3, 1])
    (permuted,) = run(Ties(0.3), taus[order])
    assert torch.equal(permuted, result[order])
    (alone,) = run(Ties(0.3, merge="mean"), taus[:1])
    assert int((alone != 0).sum()) == 90
    (zeros,) = run(Ties(0.3), torch.zeros(3, 20))
    assert not zeros.any()


def test_where_all_agree_nothing_is_lost() -> None:
    torch.manual_seed(5)
    taus = torch.rand(3, 40) + 0.1
    (mean,), (total,) = (run(Ties(1.0, merge=merge), taus) for merge in ("mean", "sum"))
    torch.testing.assert_close(mean.sum(0), taus.mean(0))
    assert torch.equal(total, taus)  # task arithmetic


def test_low_rank_experts_are_trimmed_as_their_dense_form() -> None:
    torch.manual_seed(3)
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    low = TaskVectors(("a",), {"w": Delta(torch.randn(6, 5), (LowRank(up, down, 0.5),))})
    ((_, got),) = Ties(0.4)(low)
    (want,) = run(Ties(0.4), (0.5 * up @ down)[None])
    assert torch.equal(got, want)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        Ties(density)


def test_result_is_written_once_mapped_and_keyed_by_inputs_and_settings(tmp_path: Path) -> None:
    torch.manual_seed(4)
    before = task_vectors(torch.randn(2, 8, 3), torch.randn(2, 5))
    after = apply(before, [Ties(0.5)], tmp_path, "inputs")
    for name, taus in Ties(0.5)(before):
        torch.testing.assert_close(after.deltas[name].dense(), taus, rtol=0, atol=0)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    apply(before, [Ties(0.5)], tmp_path, "inputs")
    assert file.stat().st_mtime_ns == written
    apply(before, [Ties(0.4)], tmp_path, "inputs")
    apply(before, [Ties(0.5)], tmp_path, "other inputs")
    assert len(list(tmp_path.iterdir())) == 3
