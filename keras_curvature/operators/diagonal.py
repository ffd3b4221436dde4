"""Operators that scale each weight separately."""

import dataclasses

from keras_curvature.operators.base import LinearOperator


@dataclasses.dataclass(frozen=True)
class Diagonal(LinearOperator):
    """`v -> d * v`, elementwise, for a vector `d` of non-negative entries.

    Args:
        entries: The diagonal, a list of tensors.
    """

    entries: list
    psd = True

    def multiply(self, vector):
        return [d * v for d, v in zip(self.entries, vector)]

    def inverse(self):
        """The diagonal of reciprocals."""
        return Diagonal([1.0 / d for d in self.entries])
