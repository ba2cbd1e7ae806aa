"""Low-rank experts' gradients in models that use a linear layer in ways of their own, against autograd."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.contracts import relative_error
from tests.model.test_merged_model import autograd_gradient, make, resident_gradient
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import ExpertWeight, LowRank
from trainmerge.model.low_rank_gradient import tappable


def doubled(_, inputs):
    return (2 * inputs[0],)


def squared(_, __, output):
    return output.square()


def with_hooks(layer, x):
    handles = [layer.register_forward_pre_hook(doubled), layer.register_forward_hook(squared)]
    found = layer(x)
    for handle in handles:
        handle.remove()
    return found


def with_another_forward(layer, x):
    layer.forward, before = lambda x: F.linear(2 * x, layer.weight), vars(layer).get("forward")
    found = layer(x)
    del layer.forward
    if before:
        layer.forward = before
    return found


def zeroed(y):
    y[..., 0] = 0
    return y


USES = {  # layer, x -> an output of the layer's width
    "product": lambda layer, x: x @ layer.weight.T,
    "functional": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "called and read": lambda layer, x: layer(x) * (x @ layer.weight.mT),
    "part": lambda layer, x: layer(x) + layer.weight[:, 0],
    "class's forward": nn.Linear.forward,
    "forward": lambda layer, x: layer.forward(x),
    "keyword": lambda layer, x: layer(input=x),
    "twice": lambda layer, x: layer(x) + layer(x.tanh()).sin(),
    "other weight": lambda layer, x: functional_call(layer, {"weight": 2 * layer.weight}, (x,)),
    "hooks": with_hooks,
    "another forward": with_another_forward,
    "clamped in place": lambda layer, x: layer(x).clamp_(-0.5, 0.5),
    "twice in place": lambda layer, x: layer(x).mul_(2).tanh_(),
    "rows in place": lambda layer, x: zeroed(layer(x)),
    "view in place": lambda layer, x: layer(x).view(-1, 8).mul_(x.reshape(-1, 8)).view(x.shape),
    "added in place": lambda layer, x: (2 * x).add_(layer(x)),
    "no rows": lambda layer, x: x + layer(x[:0]).sum(),
    "not always": lambda layer, x: layer(x) if x.dim() > 2 else x @ layer.weight.T,
}


class Unusual(nn.Sequential):
    """A linear layer, another one used in an unusual way on matrices and on batches, and a last one."""

    def __init__(self, use, bias):
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 8, bias=bias), nn.Linear(8, 4))
        self.use = use

    def forward(self, input):
        x = self[0](input).tanh()
        return self[2](self.use(self[1], x) + self.use(self[1], x[:, None].expand(-1, 2, -1)).sum(1))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("use", USES)
def test_gradient_is_autograds(use, bias, random_task_vectors):
    torch.manual_seed(0)
    module = Unusual(USES[use], bias)
    vectors = random_task_vectors(module, [LowRank])
    merged, plain = make(module, vectors, Grouping("tensor"))
    layers = dict(tappable(merged.module, merged.parameters, vectors.deltas))
    assert "1.weight" in layers
    want = autograd_gradient(merged, plain, seeds=(0, 1))
    column = merged.coefficients.layout.groups["1.weight"][0]
    assert use == "no rows" or want[:, column].abs().min() > 1e-4
    with merged.tapped():
        got = resident_gradient(merged, seeds=(0, 1))
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use", ["called and read", "twice in place"])
def test_recomputed_uses(use, reentrant, random_task_vectors):
    module = Unusual(USES[use], True)
    merged, plain = make(module, random_task_vectors(module, [LowRank]), Grouping("tensor"))
    module.use = lambda layer, x: checkpoint(partial(USES[use], layer), x, use_reentrant=reentrant)
    with merged.tapped():
        got = resident_gradient(merged)
    assert relative_error(got, autograd_gradient(merged, plain)) < 1e-10


def test_sparse_gradients_of_embeddings(random_task_vectors):
    module, found = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), []
    merged, _ = make(module, random_task_vectors(module, [ExpertWeight]), Grouping("tensor"))
    for sparse in (False, True):
        module[0].sparse = sparse
        module(torch.tensor([1, 2, 2, 8])).tanh().sum().backward()
        found.append(merged.gradient())
    assert relative_error(found[1], found[0]) < 1e-10
    assert found[0].abs().min() > 1e-4


def test_gradients_kept_over_backwards(random_task_vectors):
    module = Unusual(USES["called and read"], True)
    merged, plain = make(module, random_task_vectors(module, [LowRank]), Grouping("tensor"))
    merged.keep_gradients = True
    with merged.tapped():
        got = resident_gradient(merged, seeds=(0, 1))
    assert relative_error(got, autograd_gradient(merged, plain, seeds=(0, 1))) < 1e-10


@pytest.mark.parametrize("use", ["called and read", "twice in place"])
def test_mixed_precision(use, random_task_vectors):
    module = Unusual(USES[use], True)
    vectors = random_task_vectors(module, [LowRank])
    merged, plain = make(module, vectors, Grouping("tensor"), torch.float32)
    exact = autograd_gradient(merged, plain)
    with torch.autocast("cpu", torch.bfloat16), merged.tapped():
        got = resident_gradient(merged)
    assert relative_error(got, exact) < 0.05


def test_a_layer_with_another_forward_is_left_alone(random_task_vectors):
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    module[1].forward = lambda x: F.linear(2 * x, module[1].weight)
    merged, plain = make(module, random_task_vectors(module, [LowRank]), Grouping("tensor"))
    names = [n for n, _ in tappable(merged.module, merged.parameters, merged.task_vectors.deltas)]
    assert names == ["0.weight"]
    plain[1].forward = lambda x: F.linear(2 * x, plain[1].weight)  # the copy's would read the original
    with merged.tapped():
        got = resident_gradient(merged)
    assert relative_error(got, autograd_gradient(merged, plain)) < 1e-10


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo reads it
def test_compiled_parts_get_ordinary_gradients(random_task_vectors):
    module = Unusual(nn.Linear.__call__, True)
    merged, plain = make(module, random_task_vectors(module, [LowRank]), Grouping("tensor"))
    want = autograd_gradient(merged, plain)
    module.use = torch.compile(nn.Linear.__call__, backend="eager")
    arrived = []
    module[1].weight.register_hook(arrived.append)
    with merged.tapped():
        got = resident_gradient(merged)
    assert relative_error(got, want) < 1e-10
    assert arrived
