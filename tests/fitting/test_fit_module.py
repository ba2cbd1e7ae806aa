"""A fit of a plain module: gradients are autograd's, teachers are the experts, arguments stay as they are.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import trainmerge as tm
from tests.contracts import assert_same_bits, relative_error
from tests.plain_modules import batches, expert_of, net

SGD = {"optimizer": lambda c: torch.optim.SGD(c, lr=1.0), "steps": 1, "buffers": "keep", "initial": 0.25}


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, dict[str, nn.Module]]:
    base = net()
    return base, {name: expert_of(base, seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture(scope="module")
def loaders() -> dict[str, list[Tensor]]:
    return {name: batches(seed, 2) for seed, name in enumerate("ab", 10)}


@pytest.fixture
def double() -> Iterator[None]:
    """Coefficients and references in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def autograd_gradient(models, loaders, start: Tensor, layout: tm.Layout, loss) -> Tensor:
    """d loss / d coefficients [K, G] on the first batches, with the merge inside the graph."""
    base, experts = models
    values, buffers = start.clone().requires_grad_(), dict(base.named_buffers())
    weights = {
        name: own.detach()
        + sum(
            values[k, layout.groups[name][0]] * (dict(e.named_parameters())[name] - own).detach()
            for k, e in enumerate(experts.values())
        )
        for name, own in base.named_parameters()
    }
    total = sum(
        loss(functional_call(base, {**weights, **buffers}, (loaders[name][0],)), name).mean()
        for name in experts
    )
    return torch.autograd.grad(total, values)[0]


LOSSES = {
    "alignment": tm.Alignment(temperature=2.0),
    "entropy": tm.Entropy(),
    "guarded": tm.Entropy(diversity=1.0, agreement=5.0),
    "own": lambda outputs, batch: outputs.tanh().sum(-1) * batch.mean(),
}


@pytest.mark.parametrize("grouping", ["task", "tensor"])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.usefixtures("double")
def test_the_gradient_is_autograds(models, loaders, kind: str, grouping: str) -> None:
    base, experts = deepcopy(models)
    models = base.eval().double(), {name: own.double() for name, own in experts.items()}
    loaders = {name: [batch.double() for batch in own] for name, own in loaders.items()}
    base, experts = models

    def reference(logits: Tensor, name: str) -> Tensor:
        batch, log_q = loaders[name][0], logits.log_softmax(-1)
        log_p = experts[name](batch).detach().log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        if kind == "own":
            return logits.tanh().sum(-1) * batch.mean()
        if kind == "entropy":
            return entropy
        if kind == "guarded":
            marginal = -(log_q.exp() * log_q.exp().mean(0).log()).sum(-1)
            return entropy - marginal + 5 * (log_p.exp() * (log_p - log_q)).sum(-1)
        wide = [(x / 2).log_softmax(-1) for x in (experts[name](batch).detach(), logits)]
        return 4 * (wide[0].exp() * (wide[0] - wide[1])).sum(-1)

    fitted = tm.fit_module(base, experts, loaders, LOSSES[kind], grouping=tm.Grouping(grouping), **SGD)
    start = torch.full_like(fitted.coefficients.raw, 0.25)
    want = autograd_gradient(models, loaders, start, fitted.coefficients.layout, reference)
    assert want.abs().max() > 1e-4
    assert relative_error(start - fitted.coefficients().detach(), want) < 1e-10


def test_an_expert_agrees_with_itself_under_its_own_statistics(models, loaders) -> None:
    """Its teacher has its own buffers, and so has the merge if there is no other expert."""
    base, experts = models
    alone = {"a": loaders["a"]}
    with pytest.warns(UserWarning, match="the coefficients changed by at most"):
        own = tm.fit_module(
            base, {"a": experts["a"]}, alone, tm.Alignment(), steps=1, initial=1.0, buffers="average"
        )
    assert own.losses[0]["a"] == pytest.approx(0.0, abs=1e-6)
    other = tm.fit_module(
        base, {"a": experts["a"]}, alone, tm.Alignment(), steps=1, initial=1.0, buffers="keep"
    )
    assert other.losses[0]["a"] > 1e-3
    x = loaders["a"][0]
    with pytest.warns(UserWarning, match="changed"):
        still = tm.fit_module(base, {"a": experts["a"]}, alone, tm.Alignment(), steps=1, initial=1.0,
                              buffers="average", optimizer=lambda c: torch.optim.SGD(c, lr=0.0))  # fmt: skip
    assert_same_bits(still.module(x), experts["a"](x))


def test_the_result_is_the_merge_of_its_coefficients(models, loaders) -> None:
    base, experts = models
    for rule in ("keep", "average", "reestimate"):
        fitted = tm.fit_module(base, experts, loaders, tm.Alignment(), steps=3, buffers=rule,
                               preprocess=[tm.Ties(0.5)])  # fmt: skip
        merged = tm.merge_state_dicts(base, experts, fitted.coefficients, buffers=rule, loaders=loaders,
                                      preprocess=[tm.Ties(0.5)])  # fmt: skip
        for name, tensor in fitted.module.state_dict().items():
            assert_same_bits(tensor, merged[name])
        assert not fitted.module.training
        assert all(parameter.requires_grad for parameter in fitted.module.parameters())


def test_learning_lowers_the_loss(models, loaders) -> None:
    fitted = tm.fit_module(*models, loaders, tm.Alignment(), steps=30, buffers="keep")
    first, last = (sum(losses.values()) for losses in (fitted.losses[0], fitted.losses[-1]))
    assert last < 0.9 * first
    assert len(fitted.losses) == 30


def test_arguments_stay_as_they_are(models, loaders) -> None:
    base, experts = deepcopy(models[0]).train(), models[1]
    base[0].weight.requires_grad_(False)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (base, *experts.values())]
    tm.fit_module(base, experts, loaders, tm.Alignment(), steps=2, buffers="reestimate")
    for module, state in zip((base, *experts.values()), before, strict=True):
        for name, tensor in module.state_dict().items():
            assert_same_bits(tensor, state[name])
    assert base.training
    assert not base[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_data_loader_gives_what_a_list_does(models, loaders) -> None:
    """Outputs of experts on a list are computed once; on a loader's batches in each step."""
    streams = {n: DataLoader(TensorDataset(torch.cat(own)), batch_size=6) for n, own in loaders.items()}
    listed, streamed = (
        tm.fit_module(*models, given, tm.Alignment(), steps=5, buffers="keep") for given in (loaders, streams)
    )
    assert_same_bits(listed.coefficients().detach(), streamed.coefficients().detach())
    assert listed.losses == streamed.losses


def test_hidden_states_and_weights_and_a_forward_of_ones_own(models, loaders) -> None:
    """Features [B, D] align as one position, and a weight multiplies its task's loss."""

    def forward(module: nn.Module, batch: Tensor) -> tm.Outputs:
        hidden = module[:7](batch)
        return tm.Outputs(module[7:](hidden), {1: hidden})

    loss = tm.Alignment(logits=0.0, hidden=1.0, layers=[1], distance="mse", record="float32")
    given = {"forward": forward, "buffers": "keep", "steps": 1, "initial": 0.5}
    fitted = tm.fit_module(*models, loaders, loss, weights={"b": 3.0}, **given)
    merged = deepcopy(models[0]).eval()
    merged.load_state_dict(tm.merge_state_dicts(*models, 0.5, buffers="keep"))
    for name, weight in {"a": 1.0, "b": 3.0}.items():
        x = loaders[name][0]
        want = (merged[:7](x) - models[1][name][:7](x)).square().mean(-1).mean()
        assert fitted.losses[0][name] == pytest.approx(weight * want.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"hidden states of layers \[1\]: `forward` must return tm\.Outputs"):
        tm.fit_module(*models, loaders, loss, steps=1, buffers="keep")


def test_lbfgs_and_schedules_and_constraints_and_anchors(models, loaders) -> None:
    def lbfgs(coefficients):
        return torch.optim.LBFGS(coefficients, lr=0.5, max_iter=3)

    fitted = tm.fit_module(
        *models, loaders, tm.Alignment(), steps=3, buffers="keep", optimizer=lbfgs, clip=1.0,
        constraint=tm.Box(0.0, 1.0), anchor=tm.Anchor(0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )  # fmt: skip
    values = fitted.coefficients().detach()
    assert ((values >= 0) & (values <= 1)).all()
    assert sum(fitted.losses[-1].values()) < sum(fitted.losses[0].values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"loaders": {"a": []}}, "loaders for a, and the experts are a, b"),
        ({"loaders": {"a": [], "b": []}}, "loaders: a has no batch"),
        ({"loaders": {"a": iter([1]), "b": []}}, "a is an iterator, which ends after one pass"),
        ({"buffers": "mean"}, "buffers must be one of"),
        ({"preprocess": [tm.RegMean()]}, "RegMean: needs"),
        ({"initial": [0.1, 0.2, 0.3]}, "initial has 3 values for 2 experts"),
        ({"forward": lambda module, batch: module(batch)[0]}, r"forward returned \(4,\); an objective needs"),
        ({"forward": lambda module, batch: None}, "forward returned NoneType; an objective needs"),  # noqa: ARG005
        ({"loss": lambda outputs, batch: outputs.sum() * torch.nan}, r"step 0: .*'a': nan.* not finite"),  # noqa: ARG005
    ],
)
def test_wrong_arguments_are_errors(models, loaders, change: dict[str, object], words: str) -> None:
    given = {"loaders": loaders, "loss": tm.Alignment(), "steps": 1, "buffers": "keep", **change}
    with pytest.raises(ValueError, match=words):
        tm.fit_module(*models, **given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr_scheduler": ReduceLROnPlateau}, "^lr_scheduler: ReduceLROnPlateau waits for a measure"),
        ({"lr_scheduler": lambda optimizer: [optimizer]}, "lr_scheduler: list is no .*LRScheduler"),
        ({"optimizer": lambda c: torch.optim.Adam(c, lr=torch.inf)}, r"^optimizer\.lr must be finite"),
        ({"combine": nn.Identity()}, r"^combine: Identity .* a rule maps \[m, n\] to \[n\]"),
    ],
)
def test_steps_that_cannot_be_taken_are_refused_before_the_run_folder(
    models, loaders, tmp_path, change: dict[str, object], words: str
) -> None:
    given = {"loaders": loaders, "loss": tm.Alignment(), "steps": 2, "buffers": "keep", **change}
    with pytest.raises(ValueError, match=words):
        tm.fit_module(*models, run=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_reestimation_needs_batch_norms(loaders) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    with pytest.raises(ValueError, match="the module has no batch norm"):
        tm.fit_module(linear, {"a": linear}, {"a": loaders["a"]}, tm.Entropy(), steps=1, buffers="reestimate")


def test_fit_names_fit_module_for_a_module(models, tmp_path) -> None:
    with pytest.raises(TypeError, match=r"tm\.fit_module learns merges of a Sequential"):
        tm.fit(models[0], None, None, tmp_path)
