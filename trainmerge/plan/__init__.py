"""Predicted memory and time of a step, before a fit begins."""
