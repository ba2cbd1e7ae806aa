"""Which parameters share a coefficient, the coefficients, their constraints and where they start."""
