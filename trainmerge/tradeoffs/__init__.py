"""Trade-offs between tasks: a Pareto front, and a search for scores without gradients."""

from trainmerge.tradeoffs.pareto import export_point, pareto_run
from trainmerge.tradeoffs.search import search_config

__all__ = ["export_point", "pareto_run", "search_config"]
