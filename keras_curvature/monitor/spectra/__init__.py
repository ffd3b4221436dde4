"""Spectral densities, traces and diagonals, exact or from random vectors."""
