"""A run folder -> pictures, the numbers in them, and one page to look at."""

from trainmerge.report.write import write_report

__all__ = ["write_report"]
