"""Densities and traces from random vectors."""
