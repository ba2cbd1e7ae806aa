"""What the forecast says of every set of the demo's experts, and what their merges lose on held-out examples.

Legend: `K` experts, `S` of them in a set.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.__main__ import figure
from trainmerge.coefficients.forecast import Forecast
from trainmerge.coefficients.layer_systems import System, expert_moments, layer_systems
from trainmerge.data.batch import Asks
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.held_out import HeldOutJudge
from trainmerge.fitting.prepare import prepare, statistics_of
from trainmerge.system.correlation import rank_correlation

EXAMPLES = 64


def main() -> None:
    """One pass of each expert; then one merge per set of two or more experts."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        changes = {"data.max_examples": EXAMPLES, "data.held_out": 0.2}
        settings = from_config("configs/demo.yaml", Path(folder) / "run", changes)
        given = replace(settings.module.inputs(settings.data), initial=1.0, asks=Asks())
        resident = prepare(given, "cpu", nullcontext).resident
        measure, experts = statistics_of(given, resident), len(given.recipe.experts)
        clock = time.process_time()
        products: dict[str, list[Tensor]] = {}  # layer -> of each expert's inputs, [K, K]
        for name, moments in expert_moments(given.opened.layout, measure, experts):
            each = [next(layer_systems(name, (0,), [m], replace(measure, weights=[1.0]))) for m in moments]
            products[name] = [system.products for _, system in each]
        seconds = time.process_time() - clock
        judge = HeldOutJudge.of(given, resident, settings.module.objective)
        said, lost = [], []
        for chosen in (set_ for size in range(2, experts + 1) for set_ in combinations(range(experts), size)):
            found = of_set(products, chosen)
            values = torch.zeros_like(given.coefficients().detach())
            values[list(chosen)] = found.best().float()[:, None]
            given.coefficients.reset_(values)
            said.append(found.together(found.layers))
            lost.append(1 - float(judge.recovered()[list(chosen)].mean()))
            print(chosen, said[-1], lost[-1], flush=True)
    figure("forecast_seconds", seconds, "CPU seconds", "")
    first = 0
    for size in range(2, experts + 1):
        last = first + len(list(combinations(range(experts), size)))
        for kind, values_ in (("said", said), ("lost", lost)):
            own = values_[first:last]
            figure(f"forecast_{kind}_{size}", sum(own) / len(own), "share", "")
        first = last
    both = torch.tensor(said), torch.tensor(lost)
    figure("forecast_rank_correlation", rank_correlation(*both), "Spearman", "")
    pairs = slice(0, len(list(combinations(range(experts), 2))))
    figure(
        "forecast_rank_correlation_pairs", rank_correlation(both[0][pairs], both[1][pairs]), "Spearman", ""
    )


def of_set(products: dict[str, list[Tensor]], chosen: Sequence[int]) -> Forecast:
    """The forecast of merging only these experts, [S]."""
    layers: dict[str, System] = {}
    sizes: dict[str, float] = {}
    own = list(chosen)
    for name, each in products.items():
        whole = System(
            torch.stack([each[k][own][:, own] for k in own]).sum(0),
            torch.stack([each[k][own, k] for k in own]).sum(0),
            float(sum(each[k][k, k] for k in own)),
        )
        layers[name], sizes[name] = System.zero(len(own)), whole.total**0.5
        layers[name].add(whole)
    return Forecast(layers, sizes)


if __name__ == "__main__":
    main()
