"""`auto`: a race of the optimizers that a model and its data allow, over a few seconds of this machine."""
