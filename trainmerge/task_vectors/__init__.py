"""Task vectors: the experts' differences from the base, per parameter."""
