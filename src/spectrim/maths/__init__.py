"""Tensors in, tensors out: roots, projections, pivots, rounding with feedback, least squares of two streams."""
