"""Coefficients and task vectors -> an ordinary checkpoint folder."""
