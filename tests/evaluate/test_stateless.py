"""Models whose forward changes them are found, by what it changes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from typing_extensions import override

from tests.family_settings import TEXT
from trainmerge.evaluate.stateless import is_stateless


class Keeper(nn.Module):
    """Applies a layer, and changes itself as `change` says."""

    def __init__(self, change: Callable[["Keeper"], object]) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(2, 2), change
        self.register_buffer("table", torch.zeros(3))
        self.table: Tensor
        self.last: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.nested: dict[str, list[int]] = {"a": []}
        self.box = SimpleNamespace(last=None)

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return self.layer(x)  # type: ignore[no-any-return]


CHANGES: dict[str, Callable[[Keeper], object]] = {
    "nothing": lambda m: m.table + 1,
    "a buffer in place": lambda m: m.table.add_(1),
    "another buffer": lambda m: setattr(m, "table", m.table + 1),
    "an attribute": lambda m: setattr(m, "last", torch.ones(1)),
    "a dictionary": lambda m: m.kept.update(a=torch.ones(1)),
    "a list": lambda m: m.seen.append(1),
    "a list in a dictionary": lambda m: m.nested["a"].append(1),
    "an object's attribute": lambda m: setattr(m.box, "last", torch.ones(1)),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_what_a_forward_changes_is_found(name: str) -> None:
    module = nn.Sequential(nn.Identity(), Keeper(CHANGES[name]))
    assert is_stateless(module, lambda: module(torch.ones(1, 2))) == (name == "nothing")


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_positions_that_grow_with_the_text_are_found(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    settings: dict[str, Any] = {**TEXT, "max_position_embeddings": 8, "rope_parameters": rope}
    model = LlamaModel(LlamaConfig(**settings)).eval()  # type: ignore[no-untyped-call]

    def forward(length: int) -> object:
        return model(input_ids=torch.ones(1, length, dtype=torch.long))

    with torch.inference_mode():
        assert is_stateless(model, lambda: forward(4))
        assert is_stateless(model, lambda: forward(12)) == (kind == "default")


def test_changes_of_a_table_made_in_inference_mode_are_found() -> None:
    """Such tensors have no version: an earlier score may have made them."""
    module = Keeper(CHANGES["a buffer in place"])
    with torch.inference_mode():
        module.table = torch.zeros(3)
        assert not is_stateless(module, lambda: module(torch.ones(1, 2)))
