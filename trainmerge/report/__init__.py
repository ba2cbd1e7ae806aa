"""A run folder -> figures, their data, and one HTML page."""

from trainmerge.report.write import write_report

__all__ = ["write_report"]
