"""What `trainmerge inspect` finds: a recipe before it runs, the coefficients after."""

from trainmerge.inspection.inspect import inspect_path

__all__ = ["inspect_path"]
