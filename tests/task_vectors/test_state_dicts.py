"""State dicts compared: every mismatch in one error; buffers and ties by rule."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import trainmerge as tm
from tests.contracts import assert_same_bits
from trainmerge.task_vectors.state_dicts import compare_state_dicts


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    own = {
        "conv.weight": torch.ones(3, 2, 1, 1),
        "bn.weight": torch.ones(3),
        "bn.running_mean": torch.zeros(3),
        "bn.running_var": torch.ones(3),
        "bn.num_batches_tracked": torch.tensor(7),
        "index": torch.arange(4),
        "head.weight": torch.ones(4, 3),
    }
    return own | changes


def test_task_vectors_are_the_differences() -> None:
    expert = state(**{"conv.weight": torch.full((3, 2, 1, 1), 1.5), "bn.running_mean": torch.ones(3)})
    vectors = tm.TaskVectors.from_state_dicts(state(), OrderedDict(a=expert, b=state()))
    assert vectors.experts == ("a", "b")
    assert list(vectors.deltas) == ["conv.weight", "bn.weight", "head.weight"]  # no buffer, no integer
    assert torch.equal(vectors.deltas["conv.weight"].dense()[0], torch.full((3, 2, 1, 1), 0.5))
    assert not vectors.deltas["conv.weight"].dense()[1].any()


def test_nothing_is_copied_and_parameters_may_require_gradients() -> None:
    base, expert = nn.Linear(3, 2), nn.Linear(3, 2)
    vectors = tm.TaskVectors.from_state_dicts(base.state_dict(keep_vars=True), {"a": expert.state_dict()})
    delta = vectors.deltas["weight"]
    assert delta.base.data_ptr() == base.weight.data_ptr()
    assert not delta.base.requires_grad
    assert delta.terms[0].weight.data_ptr() == expert.weight.data_ptr()


def test_every_mismatch_is_in_one_error() -> None:
    a = state(
        **{"conv.weight": torch.ones(3, 2, 3, 3), "index": torch.arange(4) + 1, "own.bias": torch.ones(2)}
    )
    b = state(**{"bn.num_batches_tracked": torch.tensor(9), "head.weight": torch.ones(4, 3).to(torch.int8)})
    del b["bn.weight"]
    with pytest.raises(ValueError, match=r"^5 mismatches") as error:
        tm.TaskVectors.from_state_dicts(state(), {"a": a, "b": b})
    assert str(error.value).splitlines()[1:] == [
        "  expert a: has own.bias, which the base lacks",
        "  expert a: conv.weight is (3, 2, 3, 3), the base's is (3, 2, 1, 1)",
        "  expert a: index is torch.int64, which cannot be merged, and differs from the base's",
        "  expert b: lacks bn.weight, which the base has",
        "  expert b: head.weight is torch.int8, the base's is torch.float32",
        "leave a tensor out with `ignore`, if it need not be merged",
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "float8_e4m3fn, a quantised weight"),
        (torch.eye(2).to_sparse(), "sparse or quantised"),
        ({"step": 3}, "is dict, not a tensor"),
    ],
)
def test_what_no_merge_can_take_is_named(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"expert a: extra .*{words}|expert a: extra {words}"):
        compare_state_dicts({"w": torch.ones(2)}, {"a": {"w": torch.ones(2), "extra": value}}, (), ())
    found = compare_state_dicts(
        {"w": torch.ones(2)}, {"a": {"w": torch.ones(2), "extra": value}}, ["extra"], ()
    )
    assert found.parameters == ("w",)


def test_ignored_tensors_may_differ_and_an_idle_pattern_is_an_error() -> None:
    expert = state(**{"head.weight": torch.ones(9, 3)})
    vectors = tm.TaskVectors.from_state_dicts(state(), {"a": expert}, ignore=["head.*"])
    assert "head.weight" not in vectors.deltas
    with pytest.raises(ValueError, match=r"ignore: 'haed\.\*' matches no tensor"):
        tm.TaskVectors.from_state_dicts(state(), {"a": state()}, ignore=["haed.*"])


def test_named_buffers_are_not_merged() -> None:
    base, expert = {"w": torch.ones(2), "mask": torch.ones(2)}, {"w": torch.ones(2), "mask": torch.zeros(2)}
    assert list(tm.TaskVectors.from_state_dicts(base, {"a": expert}).deltas) == ["w", "mask"]
    assert list(tm.TaskVectors.from_state_dicts(base, {"a": expert}, buffers=["mask"]).deltas) == ["w"]


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


def test_a_tied_tensor_has_one_name_and_files_may_have_either() -> None:
    base, expert = Tied(0).state_dict(), Tied(1).state_dict()
    for missing in ((), ("embed.weight",), ("out.weight",)):
        own = {name: tensor for name, tensor in expert.items() if name not in missing}
        found = compare_state_dicts(base, {"a": own}, (), ())
        assert (found.parameters, found.ties) == (("embed.weight",), {"out.weight": "embed.weight"})
        assert_same_bits(found.experts["a"]["embed.weight"], expert["embed.weight"])
    alone = {"embed.weight": base["embed.weight"].clone()}  # as safetensors has it
    assert compare_state_dicts(alone, {"a": expert}, (), ()).parameters == ("embed.weight",)
    with pytest.raises(ValueError, match=r"out\.weight and embed\.weight are one tensor in the base"):
        compare_state_dicts(base, {"a": {**expert, "out.weight": torch.zeros(5, 3)}}, (), ())


def test_a_difference_of_dtypes_warns() -> None:
    with pytest.warns(UserWarning, match=r"expert a .*torch\.bfloat16 against torch\.float32"):
        compare_state_dicts({"w": torch.ones(2)}, {"a": {"w": torch.ones(2, dtype=torch.bfloat16)}}, (), ())


def test_two_state_dicts_are_no_task_vectors() -> None:
    for wrong in ((state(), {"a": state()}), (("a",), state())):
        with pytest.raises(
            TypeError, match=r"use TaskVectors\.from_state_dicts\(base, \{name: state_dict\}\)"
        ):
            tm.TaskVectors(*wrong)
    with pytest.raises(TypeError, match=r"base is Linear: give a state dict, such as module\.state_dict"):
        tm.TaskVectors.from_state_dicts(nn.Linear(1, 1), {"a": state()})
    with pytest.raises(ValueError, match="no experts"):
        tm.TaskVectors.from_state_dicts(state(), {})
