"""Training with `fit`: curved models, and callbacks."""
