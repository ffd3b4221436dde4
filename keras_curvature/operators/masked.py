"""The restriction of an operator to some of the weights."""

import dataclasses

import tensorflow as tf

from keras_curvature.operators.base import LinearOperator
from keras_curvature.typing import Variables, Vector


@dataclasses.dataclass(frozen=True)
class Masked(LinearOperator):
    """A diagonal block of an operator, `v -> S' A S v`, such as the block of one layer.

    `S v` has the tensors of `v` at `indices` and zeros elsewhere. The largest eigenvalue of the block is at most the
    largest eigenvalue of `A`.

    Args:
        operator: `A`, a `LinearOperator`.
        indices: For each tensor of `v`, its index in the vectors of `A`, a list of integers.
        like: A vector of `A`, for its shapes and dtypes, a list of tensors or variables.
    """

    operator: LinearOperator
    indices: list[int]
    like: Vector | Variables

    @property
    def psd(self) -> bool:  # type: ignore[override]
        """Whether `A` is positive semi-definite."""
        return self.operator.psd

    def multiply(self, vector: Vector) -> Vector:
        """`S' A S v`."""
        return self.restrict(self.operator @ self.extend(vector))

    def extend(self, vector: Vector) -> Vector:
        """`S v`."""
        own = dict(zip(self.indices, vector, strict=True))
        return [own[i] if i in own else tf.zeros(a.shape, a.dtype) for i, a in enumerate(self.like)]

    def restrict(self, vector: Vector) -> Vector:
        """`S' v`."""
        return [vector[i] for i in self.indices]
