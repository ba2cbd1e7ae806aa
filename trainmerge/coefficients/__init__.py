"""The grouping of parameters, the coefficients, their constraints and their start."""
