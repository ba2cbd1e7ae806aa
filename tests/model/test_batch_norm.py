"""Re-estimated statistics against their definition, and against torch's own modules in training mode.

Legend: `B` examples, `F` features.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

import trainmerge as tm
from tests.bounds import assert_within, sum_bound
from tests.contracts import assert_same_bits
from tests.plain_modules import batches, expert_of, net
from trainmerge.model.batch_norm import call


def test_statistics_are_the_mean_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, 3, generator=generator) * size for size in (4, 5, 9)]
    found = tm.batch_norm_statistics(nn.BatchNorm1d(3), given)
    mean = torch.stack([batch.double().mean(0) for batch in given]).mean(0)
    var = torch.stack([batch.double().var(0) for batch in given]).mean(0)
    assert found["num_batches_tracked"] == 3
    for key, want in {"running_mean": mean, "running_var": var}.items():
        size = torch.stack([batch.double().square().mean(0) for batch in given]).mean(0) + 1
        assert_within(found[key], want, 4 * sum_bound(size, 18, torch.float32))


def test_statistics_are_torchs_in_training_mode_with_all_else_in_evaluation_mode() -> None:
    module, given = expert_of(net(), 1), batches(2, 3)
    reference = deepcopy(module)
    for part in reference.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        for batch in given:
            reference(batch)
    wanted, found = reference.state_dict(), tm.batch_norm_statistics(module, given)
    assert found.keys() == {n for n in wanted if n.rpartition(".")[2] in ("running_mean", "running_var",
                                                                        "num_batches_tracked")}  # fmt: skip
    for name, value in found.items():
        assert_same_bits(value, wanted[name])


def test_the_module_is_as_it_was() -> None:
    module = expert_of(net(), 1)
    module[0].train()  # a mode of its own
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    tm.batch_norm_statistics(module, batches(0, 2))
    with pytest.raises(ZeroDivisionError):
        tm.batch_norm_statistics(module, batches(0, 2), lambda module, batch: (module(batch), 1 / 0))
    assert [part.training for part in module.modules()] == modes
    assert module[1].momentum == 0.1
    for name, tensor in module.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_no_batch_norm_and_no_batch_are_errors() -> None:
    for module in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="has no batch norm with running statistics"):
            tm.batch_norm_statistics(module, [torch.ones(2, 2)])
    with pytest.raises(ValueError, match="no batches"):
        tm.batch_norm_statistics(net(), [])


def test_the_default_forward_takes_tensors_tuples_and_mappings() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    for batch in (x, (x, "labels"), [x], {"input": x}):
        assert torch.equal(call(linear, batch), linear(x))
