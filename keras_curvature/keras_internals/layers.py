"""Private names of single layer classes."""


def batch_moments(layer, x, mask=None):
    """`(mean, variance)` of a batch as `BatchNormalization` computes them; masked positions are left out."""
    return layer._moments(x, mask)


def folder_of(layer):
    """The folder of Keras' layers that the class is from, such as `"pooling"`; `None` for a class of another source."""
    parts = type(layer).__module__.split(".")
    return parts[3] if parts[:3] == ["keras", "src", "layers"] and len(parts) > 3 else None
