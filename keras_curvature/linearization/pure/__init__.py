"""The model as a pure function of its weights, on a slice of a batch."""
