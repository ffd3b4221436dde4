"""Callbacks for training: checkpoints, several processes, and the weights of `Neumann`."""
