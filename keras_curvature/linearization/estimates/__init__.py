"""Estimates of the curvature that are no products: diagonals, Kronecker factors, means."""
