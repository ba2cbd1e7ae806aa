"""The resident merge against the same merge inside the autograd graph (`trainmerge.model.functional`).

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.bounds import assert_within, sum_bound
from tests.contracts import (
    assert_same_bits,
    inner_bound,
    magnitude,
    merge,
    merge_bound,
    relative_error,
    true_inner,
    true_merge,
)
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Sigmoid
from trainmerge.coefficients.layout import Grouping, Layout
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched
from trainmerge.model.functional import merged_weight, merged_weights
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import Delta, TaskVectors

FORMS = {
    "dense": [ExpertWeight, Difference, ExpertWeight],
    "low-rank": [LowRank, LowRank],
    "mixed": [LowRank, Untouched, ExpertWeight, Difference],
}
GROUPINGS = [Grouping("task"), Grouping("block"), Grouping("tensor"), Grouping("chunk", chunks=3)]
EXCLUDE_LLAMA = Grouping("block", exclude=["*embed*", "*norm*"])


def inputs_of(module, seed=0):
    """Keyword arguments of one batch."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(module, nn.Sequential):
        return {"input": torch.randn(5, 6, generator=generator)}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(3, 29, (3, 7), generator=generator), "attention_mask": mask}


def loss_of(call, module, seed=0):
    """A smooth loss of every logit; `call` runs the module."""
    inputs = inputs_of(module, seed)
    dtype = next(module.parameters()).dtype
    outputs = call({k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    logits = getattr(outputs, "logits", outputs)
    target = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits.log_softmax(-1) * target).mean() + (logits.tanh() * target).mean()


def make(module, task_vectors, grouping, dtype=torch.float64, constraint=None):
    """The merged model, and a copy of its module that nothing is done to."""
    module = module.to(dtype)
    task_vectors = as_dtype(task_vectors, dtype)
    layout = grouping.layout(task_vectors.shapes)
    experts, groups = len(task_vectors.experts), len(layout.labels)
    start = 0.1 + 0.8 * torch.rand(experts, groups, generator=torch.Generator().manual_seed(5))
    coefficients = Coefficients(task_vectors.experts, layout, start, constraint).to(dtype)
    plain = deepcopy(module)
    merged = MergedModel(module, task_vectors, coefficients)
    merged.materialise()
    return merged, plain


def as_dtype(task_vectors, dtype):
    """The same numbers in another dtype."""

    def cast(term):
        return type(term)(*(part.to(dtype) if isinstance(part, torch.Tensor) else part for part in term))

    deltas = {
        name: type(delta)(delta.base.to(dtype), tuple(cast(term) for term in delta.terms))
        for name, delta in task_vectors.deltas.items()
    }
    return TaskVectors(task_vectors.experts, deltas)


def resident_gradient(merged, seeds=(0,)):
    for seed in seeds:
        loss_of(lambda inputs: merged.module(**inputs), merged.module, seed).backward()
    return merged.gradient()


def autograd_gradient(merged, plain, seeds=(0,)):
    """d loss / d coefficients [K, G] with the merge inside the graph."""
    values = merged.coefficients().detach().requires_grad_()
    total = torch.zeros((), dtype=values.dtype)
    for seed in seeds:
        weights = {
            name: merged_weight(merged.task_vectors.deltas[name], merged.coefficients.of(name, values))
            for name in merged.coefficients.layout.groups
        }
        total = total + loss_of(lambda inputs, w=weights: functional_call(plain, w, (), inputs), plain, seed)
    return torch.autograd.grad(total, values)[0]


def gradient_bound(merged, plain, seeds=(0,)):
    """How far two gradients [K, G] may be apart in norm.

    <G, tau> adds up to |G| |tau| in absolute values, and no sum on the way through a model has more terms
    than the model has parameters.
    """
    coefficients, deltas = merged.coefficients, merged.task_vectors.deltas
    groups, values = coefficients.layout.groups, coefficients().detach()
    weights = {n: merged_weight(deltas[n], coefficients.of(n, values)).requires_grad_() for n in groups}
    losses = [loss_of(lambda x: functional_call(plain, weights, (), x), plain, seed) for seed in seeds]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(weights.values()))
    size = torch.zeros(values.shape, dtype=torch.float64)
    for (name, places), gradient in zip(groups.items(), gradients, strict=True):
        parts = true_inner(gradient.abs(), deltas[name], len(places), tau=magnitude)
        size.index_add_(1, torch.tensor(places), parts)
    terms = sum(parameter.numel() for parameter in plain.parameters())
    return sum_bound(size.norm(), terms, values.dtype)


def assert_gradients_equal(merged, plain, seeds=(0,)):
    want = autograd_gradient(merged, plain, seeds)
    got = resident_gradient(merged, seeds)
    assert got.dtype == merged.coefficients.raw.dtype
    assert got.shape == want.shape
    assert want.abs().max() > 1e-4
    assert (got - want).norm() < gradient_bound(merged, plain, seeds)


def snapshot(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same_parameters(module, before):
    now = dict(module.named_parameters())
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert_same_bits(now[name].detach(), value)


@pytest.fixture(params=["tiny_llama", "tiny_bert", "tiny_mlp"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: grouping.granularity)
@pytest.mark.parametrize("forms", FORMS)
def test_gradient_is_autograds(model, random_task_vectors, forms, grouping, dtype):
    merged, plain = make(model, random_task_vectors(model, FORMS[forms]), grouping, dtype)
    assert_gradients_equal(merged, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_materialised_weights_are_the_merge(model, random_task_vectors, dtype):
    merged, _ = make(model, random_task_vectors(model, FORMS["mixed"]), Grouping("chunk", chunks=3), dtype)
    values = merged.coefficients().detach()
    reference = merged_weights(merged.task_vectors, merged.coefficients)
    parameters = dict(merged.module.named_parameters())
    assert reference.keys() == parameters.keys()
    for name, delta in merged.task_vectors.deltas.items():
        want = true_merge(delta, merged.coefficients.of(name, values))
        bound = merge_bound(delta, merged.coefficients.of(name, values))
        assert_within(parameters[name].detach(), want, bound)
        assert_within(reference[name].detach(), want, bound)


def test_tied_weights_stay_tied_and_count_twice(tiny_llama, random_task_vectors):
    task_vectors = random_task_vectors(tiny_llama, FORMS["dense"])
    merged, plain = make(tiny_llama, task_vectors, Grouping("tensor", include=["*embed*"]))
    assert merged.module.lm_head.weight is merged.module.model.embed_tokens.weight
    whole = autograd_gradient(merged, plain)
    plain.lm_head.weight = nn.Parameter(merged.module.lm_head.weight.detach().clone())  # not tied any more
    assert relative_error(autograd_gradient(merged, plain), whole) > 0.1
    assert relative_error(resident_gradient(merged), whole) < 1e-10


def test_gradient_goes_through_the_constraint(tiny_bert, random_task_vectors):
    merged, plain = make(
        tiny_bert, random_task_vectors(tiny_bert, FORMS["mixed"]), Grouping("block"), constraint=Sigmoid()
    )
    weights = merged_weights(merged.task_vectors, merged.coefficients)
    loss = loss_of(lambda inputs: functional_call(plain, weights, (), inputs), plain)
    (want,) = torch.autograd.grad(loss, merged.coefficients.raw)
    merged.coefficients.backward(resident_gradient(merged))
    assert relative_error(merged.coefficients.raw.grad, want) < 1e-10


def test_backwards_accumulate_within_a_step(model, random_task_vectors):
    merged, plain = make(model, random_task_vectors(model, FORMS["mixed"]), Grouping("tensor"))
    assert_gradients_equal(merged, plain, seeds=(0, 1, 2))


@pytest.mark.parametrize("forms", FORMS)
def test_gradients_kept_cost_one_pass(model, random_task_vectors, monkeypatch, forms):
    merged, plain = make(model, random_task_vectors(model, FORMS[forms]), Grouping("chunk", chunks=2))
    merged.keep_gradients = True
    passes = []
    calls = Delta.products
    monkeypatch.setattr(Delta, "products", lambda self, *given: passes.append(self) or calls(self, *given))
    assert_gradients_equal(merged, plain, seeds=(0, 1, 2))
    assert len(passes) == len(merged.task_vectors.deltas)
    assert all(parameter.grad is None for parameter in merged.module.parameters())
    assert merged.gradient().abs().sum() == 0


def test_two_steps_do_not_leak(tiny_llama, random_task_vectors):
    task_vectors = random_task_vectors(tiny_llama, FORMS["mixed"])
    merged, plain = make(tiny_llama, task_vectors, Grouping("chunk", chunks=2))
    first = resident_gradient(merged)
    assert merged.gradient().abs().sum() == 0
    with torch.no_grad():
        merged.coefficients.raw.sub_(first / first.abs().max())
    stale = resident_gradient(merged)
    assert_same_bits(stale, first)  # the weights move when they are materialised, not before
    merged.materialise()
    assert relative_error(autograd_gradient(merged, plain), first) > 0.1
    assert_gradients_equal(merged, plain)


def test_no_gradient_is_kept(model, random_task_vectors):
    merged, _ = make(model, random_task_vectors(model, FORMS["dense"]), Grouping("tensor"))
    alive = []
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: alive.append((n, p.grad is None)))
        for name, parameter in merged.module.named_parameters()
    ]
    loss_of(lambda inputs: merged.module(**inputs), merged.module).backward()
    for handle in handles:
        handle.remove()
    assert {name for name, _ in alive} == {name for name, _ in merged.module.named_parameters()}
    assert all(freed for _, freed in alive)  # at once, not at the end of the backward
    assert all(parameter.grad is None for parameter in merged.module.parameters())
    assert merged.coefficients.raw.grad is None
    assert merged.gradient().abs().min() > 0


def test_chunks_of_one_parameter_may_share_a_coefficient(tiny_mlp, random_task_vectors):
    """As a layout file may say: the two ends of a matrix, and a bias with the middle."""
    task_vectors = as_dtype(random_task_vectors(tiny_mlp, FORMS["dense"]), torch.float64)
    layout = Layout(("ends", "middle"), {"0.weight": (0, 1, 0), "0.bias": (1,)})
    coefficients = Coefficients(task_vectors.experts, layout, 0.4).double()
    module = tiny_mlp.double()
    plain = deepcopy(module)
    merged = MergedModel(module, task_vectors, coefficients)
    merged.materialise()
    assert_gradients_equal(merged, plain)


def test_without_a_backward_the_gradient_is_zero(tiny_mlp, random_task_vectors):
    merged, _ = make(tiny_mlp, random_task_vectors(tiny_mlp, FORMS["mixed"]), Grouping("task"), torch.float32)
    assert_same_bits(merged.gradient(), torch.zeros(4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("forms", FORMS)
def test_excluded_parameters_are_the_bases(tiny_llama, random_task_vectors, forms, dtype):
    merged, plain = make(tiny_llama, random_task_vectors(tiny_llama, FORMS[forms]), EXCLUDE_LLAMA, dtype)
    assert_gradients_equal(merged, plain)
    merged.materialise()
    excluded = merged.coefficients.layout.excluded
    assert len(excluded) == 6
    for name, parameter in merged.module.named_parameters():
        base = merged.task_vectors.deltas[name].base
        assert parameter.requires_grad == (name not in excluded)
        assert parameter.grad is None
        if name in excluded:
            assert_same_bits(parameter.detach(), base)
        else:
            assert not torch.equal(parameter, base)


def test_parameters_that_no_expert_has_are_left_alone(tiny_bert, random_task_vectors):
    """A task's own head: no task vector, no gradient, no change."""
    task_vectors = random_task_vectors(tiny_bert, FORMS["dense"])
    deltas = {n: delta for n, delta in task_vectors.deltas.items() if not n.startswith("classifier")}
    merged, plain = make(tiny_bert, TaskVectors(task_vectors.experts, deltas), Grouping("tensor"))
    before = plain.classifier.weight.detach().clone()
    assert_gradients_equal(merged, plain)
    assert not merged.module.classifier.weight.requires_grad
    assert_same_bits(merged.module.classifier.weight.detach(), before)


def test_buffers_are_never_merged(tiny_llama, random_task_vectors):
    before = {name: buffer.clone() for name, buffer in tiny_llama.named_buffers()}
    assert before
    task_vectors = random_task_vectors(tiny_llama, FORMS["dense"])
    merged, _ = make(tiny_llama, task_vectors, Grouping("task"), torch.float32)
    resident_gradient(merged)
    for name, buffer in merged.module.named_buffers():
        assert_same_bits(buffer, before[name])


# its new name, activation_checkpointing_enable, is not in every transformers 5
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("grouping", [Grouping("tensor"), EXCLUDE_LLAMA], ids=["all", "excluded"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_activation_checkpointing(tiny_llama, random_task_vectors, grouping, reentrant):
    merged, plain = make(tiny_llama, random_task_vectors(tiny_llama, FORMS["mixed"]), grouping)
    want = autograd_gradient(merged, plain)
    calls = []
    merged.module.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    arguments = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    merged.module.gradient_checkpointing_enable(**arguments)
    merged.module.train()
    got = resident_gradient(merged)
    assert len(calls) == 2  # it was recomputed
    assert relative_error(got, want) < 1e-10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside the compiler
def test_compiled(tiny_mlp, random_task_vectors):
    task_vectors = random_task_vectors(tiny_mlp, FORMS["mixed"])
    merged, plain = make(tiny_mlp, task_vectors, Grouping("chunk", chunks=2))
    compiled = torch.compile(merged.module, backend="aot_eager")
    for _ in range(2):  # the second step runs the same graph on other weights
        want = autograd_gradient(merged, plain)
        loss_of(lambda inputs: compiled(**inputs), merged.module).backward()
        assert relative_error(merged.gradient(), want) < 1e-10
        with torch.no_grad():
            merged.coefficients.raw.add_(0.5)
        merged.materialise()


def test_bfloat16_weights(tiny_llama, random_task_vectors):
    """The gradient is the exact inner product with the rounded weights' own gradient."""
    merged, plain = make(
        tiny_llama, random_task_vectors(tiny_llama, FORMS["mixed"]), Grouping("tensor"), torch.bfloat16
    )
    merged.coefficients.float()
    plain.load_state_dict(merged.module.state_dict())
    loss_of(lambda inputs: plain(**inputs), plain).backward()
    pairs = [(plain.get_parameter(name).grad, delta) for name, delta in merged.task_vectors.deltas.items()]
    got = resident_gradient(merged)
    assert got.dtype == torch.float32
    want = torch.cat([true_inner(gradient, delta, 1) for gradient, delta in pairs], dim=1)
    bound = torch.cat([inner_bound(delta, gradient, 1) for gradient, delta in pairs], dim=1)
    assert_within(got, want, bound)


# --- teachers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", [Grouping("chunk", chunks=2), EXCLUDE_LLAMA], ids=["all", "excluded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_is_the_expert_itself(tiny_llama, random_task_vectors, grouping, dtype):
    task_vectors = random_task_vectors(tiny_llama, [ExpertWeight, ExpertWeight, LowRank])
    merged, plain = make(tiny_llama, task_vectors, grouping, dtype)
    before = snapshot(merged.module)
    inputs = inputs_of(merged.module)
    seen = []
    for k in range(3):
        expert, one_hot = deepcopy(plain), torch.eye(3)[:, k : k + 1]
        with torch.no_grad(), merged.teacher(k) as teacher:
            assert teacher is merged.module
            seen.append(teacher(**inputs).logits)
            for name, delta in merged.task_vectors.deltas.items():
                got, parameter = teacher.get_parameter(name), expert.get_parameter(name)
                if k < 2:
                    assert_same_bits(got.detach(), delta.terms[k].weight)
                else:  # a low-rank product is not the same to the bit in float64
                    assert_within(got, true_merge(delta, one_hot), merge_bound(delta, one_hot))
                parameter.copy_(got)
            assert_same_bits(seen[-1], expert(**inputs).logits)
        assert_same_parameters(merged.module, before)
    assert relative_error(seen[0], seen[1]) > 0.01


def test_the_merge_comes_back_after_an_error(tiny_llama, random_task_vectors):
    merged, plain = make(tiny_llama, random_task_vectors(tiny_llama, FORMS["mixed"]), EXCLUDE_LLAMA)
    before = snapshot(merged.module)
    with pytest.raises(RuntimeError, match="no memory"), merged.teacher(1):
        raise RuntimeError("no memory")
    assert_same_parameters(merged.module, before)
    assert_gradients_equal(merged, plain)


@pytest.mark.parametrize("everywhere", [False, True])
def test_uniform(tiny_llama, random_task_vectors, everywhere):
    merged, _ = make(
        tiny_llama, random_task_vectors(tiny_llama, FORMS["mixed"]), EXCLUDE_LLAMA, torch.float32
    )
    before = snapshot(merged.module)
    weights = torch.tensor([0.5, -1.0, 0.25, 2.0])
    with merged.uniform(weights, everywhere) as module:
        for name, parameter in module.named_parameters():
            delta = merged.task_vectors.deltas[name]
            moved = everywhere or name not in merged.coefficients.layout.excluded
            want = merge(delta, weights[:, None]) if moved else delta.base
            assert_same_bits(parameter.detach(), want)
            bound = merge_bound(delta, moved * weights[:, None])
            assert_within(want, true_merge(delta, moved * weights[:, None]), bound)
    assert_same_parameters(merged.module, before)
    merged.uniform(torch.zeros(4))  # nothing happens before it is entered
    assert_same_parameters(merged.module, before)


def test_task_vectors_are_never_written(tiny_llama, random_task_vectors):
    task_vectors = random_task_vectors(tiny_llama, FORMS["mixed"])
    copy = as_dtype(task_vectors, torch.float64)
    merged, _ = make(tiny_llama, task_vectors, EXCLUDE_LLAMA, torch.float32)
    resident_gradient(merged)
    with merged.teacher(0):
        resident_gradient(merged)
    for name, delta in as_dtype(merged.task_vectors, torch.float64).deltas.items():
        assert_same_bits(delta.base, copy.deltas[name].base)
        for k, term in enumerate(delta.terms):
            for got, want in zip(term, copy.deltas[name].terms[k], strict=True):
                assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want


def test_names_of_the_module_may_differ(tiny_mlp, random_task_vectors):
    """A checkpoint of the backbone alone lacks the head model's prefix."""
    task_vectors = random_task_vectors(tiny_mlp, FORMS["dense"])
    plain = deepcopy(tiny_mlp)
    wrapped = nn.ModuleDict({"backbone": tiny_mlp})
    coefficients = Coefficients(task_vectors.experts, Grouping("tensor").layout(task_vectors.shapes))
    names = {name: f"backbone.{name}" for name in task_vectors.deltas}
    merged = MergedModel(wrapped, task_vectors, coefficients, names)
    merged.materialise()
    inputs = inputs_of(plain)
    plain_merged = functional_call(plain, merged_weights(task_vectors, coefficients), (), inputs)
    torch.testing.assert_close(wrapped["backbone"](**inputs), plain_merged)


# --- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[], [7], [5, 3], [4, 2, 3]], ids=str)
@pytest.mark.parametrize("chunks", [1, 3])
def test_gradcheck_of_the_reference(random_delta, generator, shape, chunks):
    delta = random_delta(shape, FORMS["mixed"], torch.float64)
    chunks = min(chunks, shape[0] if shape else 1)
    coefficients = torch.randn(4, chunks, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: merged_weight(delta, c), coefficients)
    merged = merged_weight(delta, coefficients)
    torch.testing.assert_close(merged.detach(), true_merge(delta, coefficients.detach()))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    (want,) = torch.autograd.grad(merged, coefficients, grad)
    torch.testing.assert_close(delta.inner(grad, chunks), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_rounds_once_too(random_delta, generator, dtype):
    delta = random_delta([20, 6], FORMS["mixed"], dtype)
    coefficients = torch.randn(4, 2, generator=generator)
    got = merged_weight(delta, coefficients)
    assert got.dtype == dtype
    assert_within(got.detach(), true_merge(delta, coefficients), merge_bound(delta, coefficients))


def test_mixed_precision_sees_new_weights_inside_one_context(tiny_llama, random_task_vectors):
    """L-BFGS takes several losses, each at another merge, inside Lightning's one autocast context."""
    merged, _ = make(
        tiny_llama, random_task_vectors(tiny_llama, FORMS["dense"]), Grouping("task"), torch.float32
    )
    inputs = inputs_of(tiny_llama)

    def logits_at(value):
        with torch.no_grad():
            merged.coefficients.raw.fill_(value)
        merged.materialise()
        return merged.module(**inputs).logits  # with gradients: only then are casts kept

    with torch.autocast("cpu", torch.bfloat16):
        inside = [logits_at(value) for value in (0.0, 1.0)]
    alone = []
    for value in (0.0, 1.0):
        with torch.autocast("cpu", torch.bfloat16):
            alone.append(logits_at(value))
    assert not torch.equal(*alone)
    assert all(torch.equal(a, b) for a, b in zip(inside, alone, strict=True))
