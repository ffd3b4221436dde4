"""The noise of the gradient: its scale on fixed examples, and averaged over training steps."""
