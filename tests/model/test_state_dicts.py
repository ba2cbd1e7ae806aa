"""A merge of state dicts against its formula, against the export of folders, and its buffers by rule.

Legend: `K` experts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import trainmerge as tm
from tests.bounds import assert_within
from tests.contracts import assert_same_bits, merge_bound, true_merge
from tests.plain_modules import batches, expert_of, net
from tests.world import languages_recipe, write_languages
from trainmerge.preprocess import apply


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, dict[str, nn.Module]]:
    base = net().eval()
    return base, {name: expert_of(base, seed) for seed, name in enumerate("ab", 1)}


def test_the_merge_is_its_formula_and_buffers_are_the_bases(models) -> None:
    base, experts = models
    values = {"a": 0.3, "b": 0.8}
    merged = tm.merge_state_dicts(base, experts, values, buffers="keep")
    assert list(merged) == list(base.state_dict())
    vectors = tm.TaskVectors.from_state_dicts(
        base.state_dict(), {name: own.state_dict() for name, own in experts.items()}
    )
    coefficients = torch.tensor([[0.3], [0.8]])
    for name, own in base.state_dict().items():
        if name in vectors.deltas:
            delta = vectors.deltas[name]
            bound = merge_bound(delta, coefficients)
            assert_within(merged[name], true_merge(delta, coefficients), bound)
        else:
            assert_same_bits(merged[name], own)
            assert merged[name].data_ptr() != own.data_ptr()


def test_one_hot_is_the_expert_and_zero_is_the_base(models) -> None:
    base, experts = models
    for values, want in (({"a": 0, "b": 1}, experts["b"]), (0.0, base)):
        merged = tm.merge_state_dicts(base, experts, values, buffers="keep")
        for name, parameter in want.named_parameters():
            assert_same_bits(merged[name], parameter.detach())


METHODS = {"": [], "ties": [tm.Ties(0.5)], "dare": [tm.Dare(0.5)], "tsv": [tm.Tsv()],
           "both": [tm.Breadcrumbs(0.7, 0.1), tm.Ties(0.5)]}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


@pytest.mark.parametrize("methods", METHODS)
def test_numbers_are_those_of_folders(world: Path, methods: str, tmp_path: Path) -> None:
    """The base as a module: its ties, its roles. Experts as files, which have one name of a tie."""
    opened = languages_recipe(world, grouping=tm.Grouping("tensor", exclude=["*norm*"])).open()
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, len(opened.layout.labels), generator=generator)
    coefficients = tm.Coefficients(("a", "b"), opened.layout, values)
    vectors = apply(opened.task_vectors, METHODS[methods], tmp_path, "inputs")
    tm.export_merge(opened.base, vectors, coefficients, tmp_path / "out")
    wanted = load_file(tmp_path / "out" / "model.safetensors")
    base = LlamaForCausalLM.from_pretrained(world / "base")
    files = {name: world / name / "model.safetensors" for name in "ab"}
    merged = tm.merge_state_dicts(base, files, coefficients, preprocess=METHODS[methods])
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    assert merged.keys() - {"lm_head.weight"} == wanted.keys()
    for name, tensor in wanted.items():
        assert_same_bits(merged[name], tensor)


def cast(state, dtype):
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }


def test_half_precision_is_rounded_once(models) -> None:
    base, experts = (cast(m.state_dict(), torch.bfloat16) for m in (models[0], models[1]["a"]))
    merged = tm.merge_state_dicts(base, {"a": experts}, 0.3, buffers="keep")
    wide = {"a": cast(experts, torch.float32)}
    exact = tm.merge_state_dicts(cast(base, torch.float32), wide, 0.3, buffers="keep")
    for name, tensor in merged.items():
        assert_same_bits(tensor, exact[name].to(tensor.dtype))


def test_buffers_are_averaged_by_weight(models) -> None:
    base, experts = models
    merged = tm.merge_state_dicts(base, experts, 0.5, buffers="average", weights={"a": 3.0})
    for name, own in base.named_buffers():
        a, b = (experts[expert].state_dict()[name] for expert in "ab")
        if own.is_floating_point():
            want = 0.75 * a.double() + 0.25 * b.double()
            assert_within(merged[name], want, torch.finfo(torch.float32).eps * want.abs() + 1e-30)
        else:
            assert merged[name] == own


def test_equal_buffers_keep_their_bits() -> None:
    base = {"bn.running_mean": torch.tensor([0.1, 0.7]), "w": torch.ones(2)}
    merged = tm.merge_state_dicts(base, {n: {**base} for n in "abc"}, 0.5, buffers="average")
    assert_same_bits(merged["bn.running_mean"], base["bn.running_mean"])


def test_statistics_are_estimated_again_with_the_merged_weights(models) -> None:
    base, experts = models
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaders = {name: batches(seed, 2) for seed, name in enumerate("ab")}
    merged = tm.merge_state_dicts(base, experts, 0.5, buffers="reestimate", loaders=loaders)
    reference = net()
    reference.load_state_dict(tm.merge_state_dicts(base, experts, 0.5, buffers="keep"))
    wanted = tm.batch_norm_statistics(reference, [*loaders["a"], *loaders["b"]])
    for name, tensor in wanted.items():
        assert_same_bits(merged[name], tensor)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


class Shifted(nn.Module):
    """A batch norm, and a buffer that is none of its statistics."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("shift", torch.tensor(shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.shift


def test_other_buffers_follow_the_rule_too() -> None:
    base, experts = Shifted(0.0), {"a": Shifted(1.0), "b": Shifted(2.0)}
    assert tm.merge_state_dicts(base, experts, 0.5, buffers="average")["shift"] == 1.5
    loaders = {name: batches(0, 2) for name in "ab"}
    with pytest.warns(UserWarning, match="have buffers of their own, shift, and the merge keeps the base's"):
        merged = tm.merge_state_dicts(base, experts, 0.5, buffers="reestimate", loaders=loaders)
    assert merged["shift"] == 0.0
    assert merged["norm.num_batches_tracked"] == 4


def test_own_buffers_that_are_dropped_are_said(models) -> None:
    base, experts = models
    with pytest.warns(
        UserWarning, match=r"1\.running_mean, 1\.running_var, 7\.running_mean and 1 more, and the"
    ):
        tm.merge_state_dicts(base, experts, 0.5)
    own = {"w": torch.ones(2), "bn.running_var": torch.ones(1)}
    tm.merge_state_dicts(own, {"a": own}, 0.5)  # equal: no warning


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coefficients": {"a": 0.3}}, r"coefficients for a, and the experts are a, b"),
        ({"coefficients": float("nan")}, r"coefficients must be finite"),
        ({"weights": {"c": 1.0}}, r"weights: c are no experts"),
        ({"weights": {"a": -1.0}}, r"weights must be"),
        ({"weights": {"a": 0.0, "b": 0.0}}, r"every weight is 0"),
        ({"buffers": "mean"}, r"buffers must be one of keep, average, reestimate"),
        ({"buffers": "reestimate"}, r"give a module as the base, and `loaders`"),
        ({"preprocess": [tm.Fisher()]}, r"Fisher: needs"),
    ],
)
def test_wrong_arguments_are_errors(models, change: dict[str, object], words: str) -> None:
    base, experts = models
    with pytest.raises(ValueError, match=words):
        tm.merge_state_dicts(base, experts, **{"coefficients": 0.3, "buffers": "keep", **change})


def test_coefficients_of_another_merge_are_refused(models) -> None:
    base, experts = models
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    layout = tm.Grouping("tensor", exclude=["0.*"]).layout(shapes)
    swapped = tm.Coefficients(("b", "a"), layout, 0.3)
    with pytest.raises(ValueError, match="coefficients of b, a, and the experts are a, b"):
        tm.merge_state_dicts(base, experts, swapped, buffers="keep")
    few = tm.Coefficients(("a", "b"), tm.Grouping("task").layout({"0.weight": shapes["0.weight"]}), 0.3)
    with pytest.raises(ValueError, match=r"coefficients of other parameters: 0\.bias, 1\.bias"):
        tm.merge_state_dicts(base, experts, few, buffers="keep")
    merged = tm.merge_state_dicts(base, experts, tm.Coefficients(("a", "b"), layout, 0.3), buffers="keep")
    assert_same_bits(merged["0.weight"], base[0].weight.detach())  # excluded


def test_a_merge_that_is_not_finite_is_named(models) -> None:
    base, experts = models
    broken = {**experts["a"].state_dict(), "9.bias": torch.full((4,), torch.nan)}
    with pytest.raises(ValueError, match=r"9\.bias: merged to NaN or infinity"):
        tm.merge_state_dicts(base, {"a": broken}, 0.3, buffers="keep")


def test_ignored_tensors_that_an_expert_changed_are_named() -> None:
    base = {"w": torch.ones(2), "head": torch.ones(3)}
    experts = {"a": {"w": torch.zeros(2), "head": torch.zeros(3)}, "b": dict(base)}
    with pytest.warns(
        UserWarning, match="expert a changed head, which `ignore` leaves at the base's"
    ) as words:
        merged = tm.merge_state_dicts(base, experts, 1.0, ignore=["head"])
    assert len(words) == 1
    assert torch.equal(merged["head"], torch.ones(3))


def test_an_ignored_entry_that_is_no_tensor_is_not_compared() -> None:
    base = {"w": torch.ones(2), "head": torch.ones(3)}
    expert: dict[str, Any] = {"w": torch.zeros(2), "head": np.zeros(3)}
    merged = tm.merge_state_dicts(base, {"a": expert}, 1.0, ignore=["head"])
    assert torch.equal(merged["head"], torch.ones(3))


def test_extra_state_and_ignored_heads_stay_the_bases() -> None:
    base = {"w": torch.ones(2), "head": torch.ones(3), "extra": {"step": 3}}
    merged = tm.merge_state_dicts(base, {"a": {"w": torch.zeros(2), "head": torch.ones(5)}}, 1.0,
                                  ignore=["head", "extra"])  # fmt: skip
    assert torch.equal(merged["w"], torch.zeros(2))
    assert torch.equal(merged["head"], torch.ones(3))
    assert merged["extra"] == {"step": 3}
