"""The printed forecast of what a merge will lose."""

from trainmerge.coefficients.forecast import Forecast
from trainmerge.system.console import print_table
from trainmerge.task_vectors.parameter_names import block_of


def print_forecast(found: Forecast) -> None:
    """The shares of the experts' effect that are out of reach: by block, and in one line for the model."""
    blocks: dict[str, list[str]] = {}
    for name in found.layers:
        blocks.setdefault(block_of(name), []).append(name)
    rows = [
        [block, str(len(names)), f"{found.together(names):.0%}", f"{found.apart(names):.0%}"]
        for block, names in blocks.items()
    ]
    header = ["block", "linear layers", "one coefficient per expert", "one per expert and layer"]
    print_table("share of the experts' effect on layers' outputs that is out of reach", header, rows)
    together, apart = found.together(found.layers), found.apart(found.layers)
    print(
        f"forecast: {together:.0%} of the experts' effect on layers' outputs is out of reach with one "
        f"coefficient per expert, {apart:.0%} with one per expert and layer"
    )
