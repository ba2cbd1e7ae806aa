"""What experts of a mixture share: one coefficient per layer and kind of matrix, or one each."""

import pytest
import torch

from trainmerge.coefficients.layout import Grouping
from trainmerge.run.config import to_config

SHAPES = {
    name: torch.Size((4, 3))
    for name in [
        "layers.0.mlp.gate.weight",
        *(f"layers.0.mlp.experts.{e}.{kind}.weight" for e in (0, 1, 11) for kind in ("up", "down")),
        *(f"layers.1.mlp.experts.{e}.{kind}.weight" for e in (0, 1, 11) for kind in ("up", "down")),
        "layers.1.mlp.shared_experts.up.weight",
        "myexperts.0.weight",
        "layers.1.mlp.experts.expert_0.weight",
    ]
}  # fmt: skip


def test_a_layer_and_kind_of_matrix_share_a_coefficient() -> None:
    layout = Grouping().layout(SHAPES)
    assert layout.labels == (
        "layers.0.mlp.gate.weight", "layers.0.mlp.experts.*.up.weight", "layers.0.mlp.experts.*.down.weight",
        "layers.1.mlp.experts.*.up.weight", "layers.1.mlp.experts.*.down.weight",
        "layers.1.mlp.shared_experts.up.weight", "myexperts.0.weight", "layers.1.mlp.experts.expert_0.weight",
    )  # fmt: skip
    assert [layout.groups[f"layers.1.mlp.experts.{e}.down.weight"] for e in (0, 1, 11)] == [(4,)] * 3


def test_each_expert_has_its_own_on_request() -> None:
    layout = Grouping(mixture="expert").layout(SHAPES)
    assert layout.labels == tuple(SHAPES)


def test_chunks_of_rows_are_shared_alike() -> None:
    layout = Grouping("chunk", chunks=2).layout(SHAPES)
    groups = [layout.groups[f"layers.0.mlp.experts.{e}.up.weight"] for e in (0, 1, 11)]
    assert groups == [(2, 3)] * 3
    assert layout.labels[2:4] == (
        "layers.0.mlp.experts.*.up.weight[0]",
        "layers.0.mlp.experts.*.up.weight[1]",
    )


def test_one_expert_alone_cannot_be_held() -> None:
    held = {"layers.0.mlp.experts.1.up.weight": 0}
    with pytest.raises(ValueError, match=r"share a coefficient.*grouping\.mixture"):
        Grouping("chunk", chunks=held).layout(SHAPES)
    layout = Grouping("chunk", chunks=held, mixture="expert").layout(SHAPES)
    assert layout.fixed == layout.groups["layers.0.mlp.experts.1.up.weight"]


def test_the_default_is_in_no_configuration_of_an_earlier_version() -> None:
    assert "mixture" not in to_config(Grouping())
    assert to_config(Grouping(mixture="expert"))["mixture"] == "expert"
