"""Losses as likelihoods: which are convex, and labels drawn from the model."""
