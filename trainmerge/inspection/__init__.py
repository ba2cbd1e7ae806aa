"""`trainmerge inspect`: checks a recipe before a fit, and shows the coefficients after it."""

from trainmerge.inspection.inspect import inspect_path

__all__ = ["inspect_path"]
