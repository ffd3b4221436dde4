"""The noise of the gradient: its scale on fixed examples, and its average over training steps."""
