"""`trainmerge inspect`: checks a recipe before a fit, and shows the coefficients after it."""

from trainmerge.inspection.console import closing_words
from trainmerge.inspection.inspect import inspect_path

__all__ = ["closing_words", "inspect_path"]
