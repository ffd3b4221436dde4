"""The loss of a model on fixed examples: its value, gradient and curvature products."""
