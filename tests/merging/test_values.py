"""Values of a parameter in mergekit's files, as observed of mergekit 0.1.5 on models of zeros and ones."""

import pytest

from trainmerge.merging.values import parameter_places, setting_fault, value_at

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")]
NAMES += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def values(value: object) -> dict[str, object]:
    return {name: value_at(value, place) for name, place in parameter_places(NAMES).items()}


@pytest.mark.parametrize(
    ("gradient", "by_layer"),
    [
        ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
        ([0, 1, 0.4], [0, 0.5, 1, 0.7, 0.4]),
        ([0.7], [0.7] * 5),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([True, False], [True, True, True, True, False]),
    ],
)
def test_gradients_are_interpolated_over_the_layers(gradient: list[float], by_layer: list[float]) -> None:
    found = values(gradient)
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)] == pytest.approx(by_layer)
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert found[outside] == gradient[0]


def test_the_first_filter_inside_the_name_counts() -> None:
    found = values(
        [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 0.9}]
    )
    assert found["model.layers.3.self_attn.q_proj.weight"] == 0.75
    assert found["model.layers.3.mlp.up_proj.weight"] == 0.25
    assert found["lm_head.weight"] == 0.9
    assert set(values([{"filter": "*", "value": 0.1}, {"filter": "mlp", "value": 0.25}]).values()) == {0.1}
    for pattern in ("MLP", "*mlp*", "layers.[12].mlp"):  # a part of the name, no pattern
        assert set(values([{"filter": pattern, "value": 0.1}, {"value": 0.9}]).values()) == {0.9}
    assert values([{"filter": "mlp", "value": 0.1}])["lm_head.weight"] is None


def test_stacks_of_different_depth_have_their_own_ends() -> None:
    found = parameter_places(
        ["encoder.layer.0.w", "encoder.layer.1.w", "decoder.layer.0.w", "decoder.layer.3.w"]
    )
    assert [place.depth for place in found.values()] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("half", "is 'half', not a number"),
        (True, "is True, not a number"),
        (None, "is None, not a number"),
        (float("nan"), "not a finite number"),
        ([], "is an empty list"),
        ([0.1, {"filter": "mlp", "value": 1}], "not a number"),
        ([{"filter": "mlp"}], "without a usable value"),
        ([{"filtre": "mlp", "value": 1}], "has the key 'filtre'"),
        ([{"filter": 3, "value": 1}], "has the filter 3"),
        ([{"filter": "mlp", "value": [{"value": 1}]}], "a filter inside a filter"),
        ([{"filter": "mlp", "value": "x"}], "is 'x', not a number"),
    ],
)
def test_wrong_values_are_named(value: object, words: str) -> None:
    assert words in setting_fault(value, float)


def test_truth_is_no_number() -> None:
    assert setting_fault(1, bool) == "is 1, not true or false"
    assert (
        setting_fault([True, False], bool)
        == setting_fault(0.5, float)
        == setting_fault([{"value": [0, 1]}], float)
        == ""
    )
