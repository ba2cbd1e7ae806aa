"""Low-rank experts' gradients at their layers, against autograd and against the ordinary way.

Legend: `K` experts, `G` coefficient groups, `T` tokens.
"""

from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.contracts import relative_error
from tests.model.test_merged_model import (
    EXCLUDE_LLAMA,
    GROUPINGS,
    autograd_gradient,
    inputs_of,
    loss_of,
    make,
    resident_gradient,
)
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import ExpertWeight, LowRank, Untouched
from trainmerge.model.low_rank_gradient import layer_products, tappable
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import TaskVectors

FORMS = {
    "low-rank": [LowRank, LowRank],
    "beside untouched": [Untouched, LowRank],
    "mixed": [LowRank, ExpertWeight],
}


def tapped_names(merged):
    return {name for name, _ in tappable(merged.module, merged.parameters, merged.task_vectors.deltas)}


def tapped_gradient(merged, seeds=(0,)):
    with merged.tapped():
        return resident_gradient(merged, seeds)


@pytest.fixture(params=["tiny_llama", "tiny_bert", "tiny_mlp"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: grouping.granularity)
@pytest.mark.parametrize("forms", FORMS)
def test_gradient_is_autograds(model, random_task_vectors, forms, grouping):
    merged, plain = make(model, random_task_vectors(model, FORMS[forms]), grouping)
    want = autograd_gradient(merged, plain, seeds=(0, 1))
    assert relative_error(tapped_gradient(merged, seeds=(0, 1)), want) < 1e-10
    assert relative_error(resident_gradient(merged, seeds=(0, 1)), want) < 1e-10  # and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_are_the_inner_products_of_the_weights_gradient(random_delta, generator, dtype):
    delta = random_delta([40, 50], [LowRank, Untouched, LowRank], dtype)
    x, dy = (torch.randn(2, 17, n, generator=generator, dtype=dtype) for n in (50, 40))
    want = dy.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    for chunks in (1, 3, 40):
        error = relative_error(layer_products(x, dy, delta, chunks), delta.inner(want, chunks))
        assert error < (1e-6 if dtype == torch.float32 else 1e-10)


def test_which_weights_need_no_gradient(tiny_llama, random_task_vectors):
    merged, _ = make(tiny_llama, random_task_vectors(tiny_llama, [LowRank, Untouched]), Grouping("tensor"))
    layers = {
        n for n, m in tiny_llama.named_modules() if type(m) is nn.Linear and n != "lm_head"
    }  # that is tied
    assert tapped_names(merged) == {f"{name}.weight" for name in layers}
    arrived = set()
    for name, parameter in merged.parameters.items():
        parameter.register_hook(lambda _, name=name: arrived.add(name))
    want = merged.parameters.keys() - tapped_names(merged)
    with merged.tapped() as module:
        loss_of(lambda inputs: module(**inputs), module).backward()
        assert not tapped_names(merged)  # none twice
    assert arrived == want
    assert not any("forward" in vars(m) for m in tiny_llama.modules())


def test_what_has_to_fall_back(tiny_bert, random_task_vectors, random_delta):
    """Any full expert; ranks whose thin products would cost more; a layer with its own layout."""
    full, _ = make(tiny_bert, random_task_vectors(tiny_bert, [LowRank, ExpertWeight]), Grouping("tensor"))
    assert not tapped_names(full)
    layers = nn.ModuleDict({"wide": nn.Linear(16, 16), "conv1d": Conv1D(16, 16)})
    deltas = {
        f"{name}.weight": random_delta([16, 16], [LowRank] * count, base=layer.weight)
        for (name, layer), count in zip(layers.items(), (3, 1), strict=True)
    }
    assert list(tappable(layers, dict(layers.named_parameters()), deltas)) == []
    deltas["wide.weight"] = random_delta([16, 16], [LowRank] * 2)
    assert [name for name, _ in tappable(layers, dict(layers.named_parameters()), deltas)] == ["wide.weight"]


def test_projected_gradients_are_ordinary(tiny_bert, random_task_vectors, generator):
    merged, _ = make(tiny_bert, random_task_vectors(tiny_bert, [LowRank, LowRank]), Grouping("tensor"))
    name = sorted(tapped_names(merged))[0]
    rows = merged.parameters[name].shape[0]
    merged.subspaces = {name: torch.linalg.qr(torch.randn(rows, 3, generator=generator).double())[0]}
    want = resident_gradient(merged)
    assert relative_error(tapped_gradient(merged), want) < 1e-10
    merged.subspaces = {}
    assert relative_error(tapped_gradient(merged), want) > 1e-4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("grouping", [Grouping("tensor"), EXCLUDE_LLAMA], ids=["all", "excluded"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(tiny_llama, random_task_vectors, grouping, reentrant):
    merged, plain = make(tiny_llama, random_task_vectors(tiny_llama, [LowRank, LowRank]), grouping)
    want = autograd_gradient(merged, plain)
    tiny_llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tiny_llama.train()
    assert relative_error(tapped_gradient(merged), want) < 1e-10


def test_mixed_precision(tiny_llama, random_task_vectors):
    """The ordinary way rounds the weight's gradient to bfloat16; the tap does not."""
    vectors = random_task_vectors(tiny_llama, [LowRank, LowRank])
    merged, plain = make(tiny_llama, vectors, Grouping("tensor"), torch.float32)
    exact = autograd_gradient(merged, plain)
    with torch.autocast("cpu", torch.bfloat16):
        ordinary, tapped = resident_gradient(merged), tapped_gradient(merged)
    assert relative_error(tapped, exact) < max(0.05, 1.2 * relative_error(ordinary, exact))
    assert relative_error(tapped, ordinary) < 0.05


@pytest.mark.parametrize("tapping", [False, True])
def test_nothing_is_differentiated_before_the_first_merged_layer(tiny_llama, random_task_vectors, tapping):
    merged, plain = make(tiny_llama, random_task_vectors(tiny_llama, [LowRank, LowRank]), EXCLUDE_LLAMA)
    want = autograd_gradient(merged, plain)
    asked = {}
    names = ("model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.mlp.down_proj")
    handles = [
        tiny_llama.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: asked.update({name: output.requires_grad})
        )
        for name in names
    ]
    got = (tapped_gradient if tapping else resident_gradient)(merged)
    for handle in handles:
        handle.remove()
    assert list(asked.values()) == [False, False, True]
    assert relative_error(got, want) < 1e-10


def test_a_layer_run_twice_counts_twice(random_delta):
    layer = nn.Linear(8, 8).double()
    module = nn.Sequential(layer, nn.Tanh(), layer)
    deltas = {"0.weight": random_delta([8, 8], [LowRank], torch.float64, base=layer.weight)}
    vectors = TaskVectors(("only",), deltas)
    coefficients = Coefficients(vectors.experts, Grouping("tensor").layout(vectors.shapes)).double()
    merged = MergedModel(module, vectors, coefficients)
    merged.materialise()
    found = []
    for scope in (merged.tapped, partial(merged.uniform, torch.tensor([0.3]))):
        with scope():
            module(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
        found.append(merged.gradient())
    assert tapped_names(merged) == {"0.weight"}
    assert relative_error(*found) < 1e-10


def test_without_gradients_nothing_is_kept(tiny_llama, random_task_vectors):
    merged, _ = make(tiny_llama, random_task_vectors(tiny_llama, [LowRank]), Grouping("tensor"))
    with merged.tapped() as module, torch.no_grad():
        assert module(**inputs_of(module)).logits.grad_fn is None
