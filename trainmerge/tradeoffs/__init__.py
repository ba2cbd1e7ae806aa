"""Trade-offs between tasks: a Pareto front to choose from, and a search for what has no gradient."""

from trainmerge.tradeoffs.pareto import export_point, pareto_run
from trainmerge.tradeoffs.search import search_config

__all__ = ["export_point", "pareto_run", "search_config"]
