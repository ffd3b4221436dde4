"""Estimates of the curvature: diagonals, Kronecker factors, means."""
