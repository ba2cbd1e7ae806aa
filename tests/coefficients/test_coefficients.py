"""What shares a coefficient, and the coefficients: names, files, gradients.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.contracts import assert_same_bits
from trainmerge.coefficients.coefficients import Coefficients, load_coefficients, save_coefficients
from trainmerge.coefficients.constraints import Box, Free, Sigmoid, Simplex
from trainmerge.coefficients.initial import read_initial
from trainmerge.coefficients.layout import Grouping, Layout
from trainmerge.kernels import chunk_bounds
from trainmerge.task_vectors.parameter_names import block_of

SHAPES = {
    name: torch.Size(shape)
    for name, shape in {
        "model.embed.weight": (29, 16),
        "model.layers.0.q.weight": (16, 16),
        "model.layers.0.norm.weight": (16,),
        "model.layers.1.q.weight": (16, 16),
        "model.layers.1.norm.weight": (16,),
        "model.layers.10.q.weight": (3, 16),
        "model.norm.weight": (16,),
        "logit_scale": (),
    }.items()
}
GROUPINGS = [
    Grouping("task"),
    Grouping("block"),
    Grouping("tensor"),
    Grouping("chunk"),
    Grouping("chunk", chunks=5),
    Grouping("chunk", chunks=1000),
    Grouping("block", exclude=["*norm*"]),
]


def test_task_shares_one_coefficient():
    layout = Grouping("task").layout(SHAPES)
    assert layout.labels == ("all",)
    assert layout.groups == dict.fromkeys(SHAPES, (0,))
    assert layout.excluded == {}


def test_block_shares_within_a_numbered_block_or_a_module():
    layout = Grouping("block").layout(SHAPES)
    assert layout.labels == (
        "model.embed", "model.layers.0", "model.layers.1", "model.layers.10", "model.norm", "logit_scale",
    )  # fmt: skip
    assert list(layout.groups.values()) == [(0,), (1,), (1,), (2,), (2,), (3,), (4,), (5,)]
    assert list(layout.groups) == list(SHAPES)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("vision.encoder.layers.11.attn.0.weight", "vision.encoder.layers.11"),
        ("0.weight", "0"),
        ("0.attn.1.weight", "0"),
        ("embeddings.LayerNorm.weight", "embeddings.LayerNorm"),
        ("layer4.1.conv2.weight", "layer4.1"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_block_of(name, block):
    assert block_of(name) == block


def test_tensor_gives_each_its_own():
    layout = Grouping("tensor").layout(SHAPES)
    assert layout.labels == tuple(SHAPES)
    assert layout.groups == {name: (i,) for i, name in enumerate(SHAPES)}


def test_chunks_are_numbered_within_their_parameter():
    layout = Grouping("chunk", chunks=4, include=["*layers.10*", "logit_scale", "*layers.0*"]).layout(SHAPES)
    assert layout.groups == {
        "model.layers.0.q.weight": (0, 1, 2, 3),
        "model.layers.0.norm.weight": (4, 5, 6, 7),
        "model.layers.10.q.weight": (8, 9, 10),  # three rows
        "logit_scale": (11,),
    }
    assert layout.labels[8:] == (
        "model.layers.10.q.weight[0]", "model.layers.10.q.weight[1]", "model.layers.10.q.weight[2]",
        "logit_scale[0]",
    )  # fmt: skip


@pytest.mark.parametrize("grouping", GROUPINGS, ids=repr)
def test_no_coefficient_is_dead(grouping):
    """Every group is some chunk's, and every chunk has rows."""
    layout = grouping.layout(SHAPES)
    assert {group for groups in layout.groups.values() for group in groups} == set(range(len(layout.labels)))
    assert len(set(layout.labels)) == len(layout.labels)
    for name, groups in layout.groups.items():
        rows = SHAPES[name][0] if SHAPES[name] else 1
        assert 1 <= len(groups) <= rows
        assert torch.tensor(chunk_bounds(rows, len(groups))).diff().min() >= 1


def test_an_empty_parameter_has_a_chunk_too():
    assert Grouping("chunk", chunks=3).layout({"w": torch.Size([0, 4])}).groups == {"w": (0,)}


def test_what_is_left_out_says_why():
    grouping = Grouping(include=["model.*"], exclude=["*norm*", "model.layers.0.*"])
    layout = grouping.layout(SHAPES)
    assert layout.excluded == {
        "model.layers.0.q.weight": "excluded by 'model.layers.0.*'",
        "model.layers.0.norm.weight": "excluded by '*norm*'",
        "model.layers.1.norm.weight": "excluded by '*norm*'",
        "model.norm.weight": "excluded by '*norm*'",
        "logit_scale": "matches no include pattern",
    }
    assert list(layout.groups) == [name for name in SHAPES if name not in layout.excluded]
    assert layout.labels == tuple(layout.groups)


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(field):
    patterns = ["model.*", "model.layer.*", "*.Norm.*"]
    with pytest.raises(ValueError, match="match no parameter") as error:
        Grouping(**{field: patterns}).layout(SHAPES)
    assert "['model.layer.*', '*.Norm.*']" in str(error.value)  # both at once, and only they
    assert "model.embed.weight" in str(error.value)


def test_nothing_left_to_merge_is_an_error():
    with pytest.raises(ValueError, match="no parameter is left to merge"):
        Grouping(exclude=["model.*", "logit*"]).layout(SHAPES)
    with pytest.raises(ValueError, match="match no parameter"):
        Grouping().layout({})


def test_chunks_have_to_fit_the_granularity():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Grouping("chunk", chunks=0)
    with pytest.raises(ValueError, match="chunks=2 needs granularity=chunk, not tensor"):
        Grouping("tensor", chunks=2)
    with pytest.raises(FrozenInstanceError):
        Grouping("chunk", chunks=2).chunks = 3


@pytest.mark.parametrize("grouping", GROUPINGS, ids=repr)
def test_layout_survives_json(grouping):
    layout = grouping.layout(SHAPES)
    back = Layout.from_json(layout.to_json())
    assert back == layout
    assert list(back.groups.items()) == list(layout.groups.items())  # tuples, in the same order
    assert json.loads(layout.to_json())["labels"] == list(layout.labels)


def test_of_picks_the_chunks_columns():
    layout = Layout(("a", "b", "c"), {"x": (2, 0, 2), "y": (1,)})
    coefficients = Coefficients(["e", "f"], layout, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    values = coefficients()
    assert coefficients.of("x", values).tolist() == [[3, 1, 3], [6, 4, 6]]
    assert coefficients.of("y", values).tolist() == [[2], [5]]
    (gradient,) = torch.autograd.grad(coefficients.of("x", values).sum(), coefficients.raw)
    assert gradient.tolist() == [[1, 0, 2], [1, 0, 2]]


LAYOUT = Layout(("a", "b", "c"), {"x": (0, 1), "y": (2,)})


@pytest.mark.parametrize(
    ("initial", "want"),
    [
        (0.5, [[0.5] * 3, [0.5] * 3]),
        (torch.tensor([[0.25], [0.75]]), [[0.25] * 3, [0.75] * 3]),
        (torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]]), [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]]),
    ],
    ids=["scalar", "[K, 1]", "[K, G]"],
)
@pytest.mark.parametrize("constraint", [None, Free(), Box(), Sigmoid()], ids=repr)
def test_initial(initial, want, constraint):
    coefficients = Coefficients(["e", "f"], LAYOUT, initial, constraint)
    torch.testing.assert_close(coefficients().detach(), torch.tensor(want))
    assert [name for name, _ in coefficients.named_parameters()] == ["raw"]
    assert not list(coefficients.buffers())


def test_initial_is_not_shared_with_the_caller():
    initial = torch.full((2, 3), 0.5)
    coefficients = Coefficients(["e", "f"], LAYOUT, initial)
    with torch.no_grad():
        coefficients.raw.fill_(7)
    assert initial.unique().tolist() == [0.5]


def test_initial_outside_the_set_is_refused():
    with pytest.raises(ValueError, match="outside the box"):
        Coefficients(["e", "f"], LAYOUT, 1.5, Box())
    with pytest.raises(ValueError, match="sum to 1"):
        Coefficients(["e", "f"], LAYOUT, 0.3, Simplex())


@pytest.mark.parametrize(
    ("default", "want"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_coefficients_are_float32_or_wider(default, want):
    """Lightning's bf16-true sets the default dtype; bfloat16 coefficients would not move at lr 1e-4."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        assert Coefficients(["e", "f"], LAYOUT).raw.dtype == want
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("constraint", [Free(), Box(), Sigmoid(), Simplex()], ids=repr)
def test_backward_is_autograd(constraint, generator):
    inside = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    start = inside / inside.sum(0)
    ours, theirs = (Coefficients(["e", "f"], LAYOUT, start, constraint).double() for _ in range(2))
    mix = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    for _ in range(2):  # gradients add up
        values = ours().detach().requires_grad_()
        (gradient,) = torch.autograd.grad((mix * values).sin().sum(), values)
        ours.backward(gradient)
        (mix * theirs()).sin().sum().backward()
        torch.testing.assert_close(ours.raw.grad, theirs.raw.grad)
    assert ours.raw.grad.abs().min() > 0


def test_backward_takes_a_gradient_in_any_dtype():
    coefficients = Coefficients(["e", "f"], LAYOUT)
    coefficients.backward(torch.ones(2, 3, dtype=torch.float64))
    assert_same_bits(coefficients.raw.grad, torch.ones(2, 3))


def test_project_changes_raw_in_place():
    coefficients = Coefficients(["e", "f"], LAYOUT, 0.5, Box())
    raw = coefficients.raw
    with torch.no_grad():
        raw.copy_(torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, 0.25]]))
    coefficients.project_()
    assert coefficients.raw is raw  # the optimizer holds it
    assert isinstance(raw, nn.Parameter)
    assert raw.tolist() == [[0, 0.5, 1], [0, 1, 0.25]]


@pytest.mark.parametrize("constraint", [Free(), Sigmoid()], ids=repr)
def test_save_keeps_values_experts_and_layout(tmp_path, generator, constraint):
    layout = Grouping("chunk", chunks=3, exclude=["*embed*"]).layout(SHAPES)
    start = torch.rand(2, len(layout.labels), generator=generator)
    coefficients = Coefficients(["b", "a"], layout, start, constraint)
    save_coefficients(coefficients, tmp_path / "c.safetensors")
    back = load_coefficients(tmp_path / "c.safetensors")
    assert back.experts == ("b", "a")
    assert back.layout == layout
    assert_same_bits(back().detach(), coefficients().detach())  # values, not raw


def test_load_refuses_another_file(tmp_path):
    save_file({"coefficients": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: not a coefficients file"):
        load_coefficients(tmp_path / "other.safetensors")


def test_read_initial(tmp_path, generator):
    assert read_initial(0.25, ["e", "f"], LAYOUT).tolist() == [[0.25], [0.25]]
    assert read_initial([0.25, 0.75], ["e", "f"], LAYOUT).tolist() == [[0.25], [0.75]]
    saved = Coefficients(["e", "f"], LAYOUT, torch.rand(2, 3, generator=generator))
    path = tmp_path / "c.safetensors"
    save_coefficients(saved, path)
    assert_same_bits(read_initial(str(path), ["e", "f"], LAYOUT), saved().detach())
    with pytest.raises(ValueError, match="3 values for 2 experts"):
        read_initial([0.1, 0.2, 0.3], ["e", "f"], LAYOUT)
    with pytest.raises(ValueError, match="a merge of other experts"):
        read_initial(str(path), ["f", "e"], LAYOUT)
    with pytest.raises(ValueError, match="grouping does not match"):
        read_initial(str(path), ["e", "f"], Layout(("a",), {"x": (0,)}))
