"""Mixtures of experts: made of dense experts, and made smaller."""
