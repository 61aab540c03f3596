"""Rounding that knows the update or the run's curvature, at scales that are fixed before."""
