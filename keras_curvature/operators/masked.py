"""An operator on some of the weights, with the others fixed."""

import dataclasses

import tensorflow as tf

from keras_curvature.operators.base import LinearOperator


@dataclasses.dataclass(frozen=True)
class Masked(LinearOperator):
    """`v -> S' A S v`, with `S v` the vector `v` at some places of a longer one and zeros elsewhere.

    A diagonal block of `A`, such as the block of one layer. Its largest eigenvalue is at most the largest of `A`.

    Args:
        operator: `A`.
        indices: The places of the short vectors' tensors in the vectors of `A`, a list of integers.
        like: Tensors or variables with the shapes of the vectors of `A`, a list.
    """

    operator: LinearOperator
    indices: list
    like: list

    @property
    def psd(self):
        """Whether `A` is."""
        return self.operator.psd

    def multiply(self, vector):
        """`S' A S v`."""
        return self.restrict(self.operator @ self.extend(vector))

    def extend(self, vector):
        """`S v`."""
        own = dict(zip(self.indices, vector, strict=True))
        return [own[i] if i in own else tf.zeros(a.shape, a.dtype) for i, a in enumerate(self.like)]

    def restrict(self, vector):
        """`S' v`."""
        return [vector[i] for i in self.indices]
