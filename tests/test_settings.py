"""Every dataclass of settings refuses wrong types, NaN, infinity and negative numbers without a meaning."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from inspect import isabstract
from typing import Any, get_args, get_type_hints

import pytest

import trainmerge as tm
from trainmerge.fitting.model_settings import ModelSettings
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.tradeoffs.cma_es import Search
from trainmerge.tradeoffs.niches import Niches

VALID = [
    tm.Expert("a"), tm.HeldOut("t"), tm.Recipe("base", {"a": tm.Expert("a")}), tm.Grouping(), tm.Columns(),
    tm.TokenRow("a"), tm.Generate(4), tm.OnPolicy(), tm.JensenShannon(), tm.AttentionHeads(), tm.Gauge(),
    tm.Neurons(), tm.NeuronScales(), tm.ResidualStream(), tm.Anchor(), tm.Free(), tm.Box(), tm.Sigmoid(),
    tm.Simplex(), tm.LayerLeastSquares(), tm.LayerDistillation(), tm.CheckpointAverage(),
    tm.LayerSwap("a", "b"), tm.MetricsWeighted({"a": 1.0}), tm.DomainPosterior("t"), tm.T3("t"),
    tm.Breadcrumbs(), tm.Consensus(), tm.Dare(), tm.Doge(), tm.Fisher(), tm.ModelStock(), tm.Opcm(),
    tm.OptMerge(), tm.Pcb(), tm.Rcp("a", "b"), tm.RegMean(), tm.Slerp(), tm.Ties(), tm.Tsv(), tm.Widen(),
    tm.Wudi(), tm.Aim(), tm.CoreSpace(), tm.Della(), tm.Iso(), tm.Karcher(), tm.Knots(), tm.Pico(),
    tm.Trim(), tm.TrainedMasks(), tm.Trim((0.5, 1.0)), tm.LocalizeAndStitch(), tm.MagMax(), tm.Ram(),
    tm.Sce(), tm.Svc(), tm.Entropy(), tm.Alignment(), tm.Similarity(), tm.TotalVariation(),
    tm.LabelHead(["a", "b"]), tm.LinearHead("f"), tm.CalibratedRouters(), tm.AdapterForm(), tm.Int8(),
    tm.Ternary(), ModelSettings(), StepSchedule(), Search(), Niches(), tm.PackedForm("mask"), tm.Concrete(),
]  # fmt: skip
MADE_BY_US = {
    "Layout",
    "Asks",
    "Delta",
    "TaskVectors",
    "Plan",
    "FittedModule",
    "Choice",
    "Packed",
}  # results, not settings
ENDLESS = {"Box.low", "Box.high", "OptMerge.time", "Wudi.time", "Widen.above"}  # infinity has a meaning
SIGNED = {
    "Box.low",
    "Box.high",
    "Anchor.at",
    "Alignment.layers",
    "T3.low",
    "T3.high",
    "Dare.seed",
    "Della.seed",
}


def numeric() -> Iterator[tuple[Any, str]]:
    """(settings, field) of every field that is a number, or may be one."""
    for settings in VALID:
        kinds = get_type_hints(type(settings))
        for field in fields(settings):
            kind = kinds[field.name]
            if {int, float} & {kind, *get_args(kind), *(i for a in get_args(kind) for i in get_args(a))}:
                yield settings, field.name


NUMBERS = list(numeric())


def refused(settings: Any, name: str, value: object) -> bool:
    try:
        replace(settings, **{name: value})
    except ValueError as error:
        return name in str(error) or "tasks_per_backward" in str(error)
    return False


def test_no_dataclass_is_forgotten() -> None:
    public = {getattr(tm, name) for name in tm.__all__ if name not in MADE_BY_US}
    settings = {kind for kind in public if is_dataclass(kind) and not isabstract(kind)}
    assert not settings - {type(value) for value in VALID}


@pytest.mark.parametrize(
    ("settings", "name"), NUMBERS, ids=[f"{type(settings).__name__}.{name}" for settings, name in NUMBERS]
)
def test_no_number_is_what_is_none(settings: Any, name: str) -> None:
    path = f"{type(settings).__name__}.{name}"
    for value in (math.nan, True, b"1", {"x"}):
        assert refused(settings, name, value), value
    if path not in ("Grouping.chunks", "Anchor.at", "TokenRow.token"):
        assert refused(settings, name, "x")
    for value in (math.inf, -math.inf):
        assert refused(settings, name, value) or path in ENDLESS, value
    assert refused(settings, name, -1) or path in SIGNED


@pytest.mark.parametrize("settings", VALID, ids=lambda settings: type(settings).__name__)
def test_a_text_is_no_list_and_a_number_no_flag(settings: Any) -> None:
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        kind, value = kinds[field.name], getattr(settings, field.name)
        if kind is bool:
            assert refused(settings, field.name, "no")
            assert refused(settings, field.name, 1)
        elif kind is str:
            assert refused(settings, field.name, "")
            assert refused(settings, field.name, 5)
        elif isinstance(value, tuple):
            assert refused(settings, field.name, "abc")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (tm.Simplex(), "total"), (tm.Alignment(), "temperature"), (tm.LabelHead(["a", "b"]), "scale"),
        (tm.Ties(), "density"), (tm.Doge(), "eta"), (tm.Fisher(), "floor"), (tm.DomainPosterior("t"), "rate"),
        (tm.T3("t"), "max_texts"), (ModelSettings(), "teacher_budget"), (tm.Grouping("chunk"), "chunks"),
        (tm.MetricsWeighted({"a": 1.0}), "metrics"), (Search(), "population"),
    ],
)  # fmt: skip
def test_where_zero_means_nothing(settings: Any, name: str) -> None:
    assert refused(settings, name, {"a": 0.0} if name == "metrics" else 0)


@pytest.mark.parametrize(
    ("build", "given"),
    [
        (tm.StopWhenFlat, {"patience": math.nan}),
        (tm.StopWhenFlat, {"patience": 2.5}),
        (tm.StopWhenFlat, {"smoothing": 1}),
        (tm.StopWhenFlat, {"least": -1.0}),
        (tm.StopWhenFlat, {"least": math.nan}),
        (tm.make_trainer, {"run": ""}),
        (tm.make_trainer, {"run": "r", "save_every": True}),
        (tm.make_trainer, {"run": "r", "save_every": math.nan}),
        (tm.Calibration, {"files": {}, "tokenizer": "t", "batch_size": 0}),
        (tm.Calibration, {"files": {}, "tokenizer": "t", "max_length": True}),
        (tm.Calibration, {"files": {}, "tokenizer": "t", "seed": -1}),
        (tm.plan_model, {"folder": "f", "experts": 2, "devices": 0}),
        (tm.pareto_run, {"run": "r", "radius": math.nan}),
        (tm.pareto_run, {"run": "r", "points": -1}),
    ],
)
def test_options_of_functions(build: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{[*given][-1]} must be"):
        build(**given)
