"""The coefficients' gradient of some families of models against autograd; `make families` runs all.

Mamba and Jamba read `dt_proj.weight`, and MobileBERT a part of its head, without calling the layer; OLMo,
Llama 4 and Gemma 3n change a layer's output in place.
"""

import pytest

from tests.gradient_sweep import FORMS, sweep
from tests.model_families import FAMILIES

SOME = ("Llama", "Mamba", "Jamba", "MobileBERT", "OLMo clip_qkv", "Llama 4", "Gemma 3n", "Qwen2-VL")


CASES = [(form, False) for form in FORMS] + [("low-rank", True)]


@pytest.mark.parametrize(("form", "recompute"), CASES)
@pytest.mark.parametrize("family", SOME)
def test_gradient_is_autograds(family: str, form: str, recompute: bool) -> None:
    found = sweep(FAMILIES[family], form, recompute)
    if found is None:
        assert family == "MobileBERT"  # its blocks cannot be recomputed
        return
    assert found.right, found
    # also linear layers that experts of embeddings leave unchanged: these need no gradient
    assert bool(found.tapped) == (form not in ("full", "mixed"))


def test_the_sweep_is_wide() -> None:
    assert len({family.kind for family in FAMILIES.values()}) >= 60
