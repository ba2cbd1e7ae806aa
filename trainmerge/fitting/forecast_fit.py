"""The forecast of a configuration's merge: each expert once over a few examples, and nothing learned."""

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from trainmerge.coefficients.forecast import Forecast, forecast
from trainmerge.data.batch import Asks
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.preflight import check_heads
from trainmerge.fitting.prepare import prepare, statistics_of


def forecast_config(config: str | Path, examples: int = 16) -> Forecast:
    """What a configuration's merge will lose, layer by layer; a run folder is not needed.

    Args:
        config: A YAML file of `trainmerge fit`.
        examples: The first so many calibration examples of each expert.

    Raises:
        ValueError: the file, or a file that it names, is invalid; an expert has no examples; they reach no
            linear layer that is merged.
    """
    with tempfile.TemporaryDirectory() as place:
        changes = {"data.max_examples": examples}
        settings = from_config(config, Path(place) / "run", changes)
        check_heads(settings.module)
        given = replace(settings.module.inputs(settings.data), initial=1.0, asks=Asks())
        if lacking := [name for name, own in given.recipe.experts.items() if not own.calibration]:
            raise ValueError(f"{config}: the forecast reads examples of each expert, and {lacking} have none")
        resident = prepare(given, "cpu", nullcontext).resident
        return forecast(given.opened.layout, statistics_of(given, resident), len(given.recipe.experts))
