"""Linear maps on weight space. An operator knows how to multiply; it never knows how to solve.

    A @ v        the product with a vector (a list of tensors)
    A + B        the sum
    s * A        the multiple by a number or a scalar tensor

`psd` says whether the map is symmetric positive semi-definite. Whoever builds an operator says so; nothing
computes it. A solver that needs it (conjugate gradients) refuses an operator that does not have it. A damped
curvature is written `linearization.gauss_newton() + damping * Identity()`.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_curvature import trees


class LinearOperator:
    """A symmetric map `v -> A v` on lists of tensors. Subclasses write `multiply`.

    Attributes:
        psd: Whether `v'Av >= 0` for every `v`.
    """

    psd = False

    def multiply(self, vector):
        """`A v`, for `vector` a list of tensors; the same shapes come back."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `multiply(vector)`.")

    def __matmul__(self, vector):
        return self.multiply(vector)

    def __add__(self, other):
        return Sum(self, other)

    def __rmul__(self, scalar):
        return Scaled(scalar, self)

    def quadratic_form(self, u, v):
        """`u' A v`, a scalar."""
        return trees.dot(u, self @ v)


@dataclasses.dataclass(frozen=True)
class Function(LinearOperator):
    """An operator known only by its product, such as a Hessian."""

    product: Callable
    psd: bool = False

    def multiply(self, vector):
        return self.product(vector)


@dataclasses.dataclass(frozen=True)
class Identity(LinearOperator):
    """`v -> v`."""

    psd = True

    def multiply(self, vector):
        return vector


@dataclasses.dataclass(frozen=True)
class Sum(LinearOperator):
    """`v -> A v + B v`."""

    left: LinearOperator
    right: LinearOperator

    @property
    def psd(self):
        return self.left.psd and self.right.psd

    def multiply(self, vector):
        return trees.add(self.left @ vector, self.right @ vector)


@dataclasses.dataclass(frozen=True)
class Scaled(LinearOperator):
    """`v -> s A v`; positive semi-definite where `A` is, for the scalar of a damping is not negative."""

    scalar: object
    operator: LinearOperator

    @property
    def psd(self):
        negative = isinstance(self.scalar, (int, float)) and self.scalar < 0
        return self.operator.psd and not negative

    def multiply(self, vector):
        product = vector if isinstance(self.operator, Identity) else self.operator @ vector
        return trees.scale(self.scalar, product)


def dense(operator, like):
    """The matrix of `operator` for vectors shaped as `like`, shape `(n, n)`. `n` products: for tests."""
    sizes = [int(a.shape.num_elements()) for a in like]
    columns = []
    for unit in tf.unstack(tf.eye(sum(sizes), dtype=like[0].dtype)):
        vector = [tf.reshape(part, a.shape) for part, a in zip(tf.split(unit, sizes), like)]
        columns.append(tf.concat([tf.reshape(a, [-1]) for a in operator @ vector], 0))
    return tf.stack(columns, axis=1)
