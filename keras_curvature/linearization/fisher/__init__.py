"""Losses as likelihoods: what is convex, and labels drawn from what the model says."""
