"""Diagonal operators."""

import dataclasses

from keras_curvature.operators.base import LinearOperator
from keras_curvature.typing import Vector


@dataclasses.dataclass(frozen=True)
class Diagonal(LinearOperator):
    """`v -> d * v`, elementwise.

    Args:
        entries: `d`, the diagonal, a list of non-negative tensors with the shapes of `v`.

    Example: `Diagonal([tf.square(g) for g in gradient]) @ vector`
    """

    entries: Vector
    psd = True

    def multiply(self, vector: Vector) -> Vector:
        return [d * v for d, v in zip(self.entries, vector)]

    def inverse(self) -> "Diagonal":
        """The inverse operator, `v -> v / d`; the entries must be positive."""
        return Diagonal([1.0 / d for d in self.entries])
