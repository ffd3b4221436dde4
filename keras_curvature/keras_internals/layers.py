"""Private names of single layer classes."""


def batch_moments(layer, x, mask=None):
    """`(mean, variance)` of a batch as `BatchNormalization` computes them; masked positions are left out."""
    return layer._moments(x, mask)
