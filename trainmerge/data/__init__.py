"""Examples, tokens and batches; the frozen heads of the tasks."""
