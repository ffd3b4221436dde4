"""Private names of single kinds of layers."""


def batch_moments(layer, x, mask=None):
    """`(mean, variance)` of a batch as a `BatchNormalization` takes them; `mask` leaves positions out."""
    return layer._moments(x, mask)
