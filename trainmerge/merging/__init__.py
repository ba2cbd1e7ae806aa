"""Merges in one call: mergekit's files, methods by name, and a configuration from its fit to its export."""
