"""Directions of the residual stream, their exemplars and descriptions."""
