"""Factors that see the gradient whitened by the other factors, for KL-Shampoo and SOAP.

    L <- beta_2 L + (1 - beta_2) G R^-1 G' / d_R,    R <- beta_2 R + (1 - beta_2) G' L^-1 G / d_L

The inverses are made of a basis and eigenvalues in it. The eigenvalues are averages of the diagonals of the same second
moments in that basis, updated in every step, while the basis may be older.
"""

import math

import tensorflow as tf

from keras_curvature.operators import axes
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.typing import Variables, Vector

INITIAL = 0.1  # eigenvalues at the start (the authors of KL-Shampoo)
# Largest weight of a direction, at the start and where the gradient vanishes (the authors' `max_clamp_value`).
LARGEST_WEIGHT = 4000


class KLFactors(ByAxis):
    """Base of the methods with such factors; a subclass has the attribute `beta_2`."""

    def add_eigenvalues(self, initial: float = INITIAL) -> Variables:
        """A vector for each axis that gets a matrix."""
        return [
            self.add_variable(
                (self._shapes[i][k],), lambda shape, dtype: tf.fill(shape, tf.constant(initial, dtype)),
                dtype=self._dtype, name=f"eigenvalues_{i}_{k}",
            )
            for i, k in self._places
        ]  # fmt: skip

    def whitening(self, values: Vector, begun: tf.Tensor) -> Vector:
        """The weights of the directions, one over the roots of the eigenvalues; the first gradient is not whitened."""
        return [tf.where(begun, tf.math.rsqrt(value), tf.ones_like(value)) for value in values]

    def whitened_moments(self, G: Vector, Q: Vector, weights: Vector) -> tuple[Vector, Vector]:
        """For each factor the second moment of the gradient whitened along all other axes, and its diagonal in `Q`."""
        Q, weights = self.by_tile(Q), self.by_tile(weights)
        found = [moments(G[i], k, Q[i], weights[i]) for i, k in self._places]
        return [matrix for matrix, _ in found], [diagonal for _, diagonal in found]

    def remember_eigenvalues(self, variables: Variables, values: Vector, seen: Vector, begun: tf.Tensor) -> None:
        """The next eigenvalues, with the authors' clamping of the inverse root."""
        for variable, old, new in zip(variables, values, self.average(values, seen, self.beta_2)):
            floor = 1.0 / max(10, min(LARGEST_WEIGHT, int(variable.shape[0]))) ** 2
            self.remember(variable, tf.where(begun, tf.maximum(new, tf.constant(floor, new.dtype)), old))


def moments(G, axis, Q, weights):
    """For the gradient whitened along all other axes: `T T'` of an axis, and its diagonal in the axis' own basis."""
    others = [None if k == axis else q for k, q in enumerate(Q)]
    scale = math.prod(along(w, k, G) for k, w in enumerate(weights) if k != axis and w is not None)
    T = axes.multiply_transposed(G, others) * scale
    turned = axes.multiply_transposed(G, Q) * scale
    means = [k for k in range(len(Q)) if k != axis]
    matrix = axes.second_moment(T, axis) * (int(G.shape[axis]) / G.shape.num_elements())
    return matrix, tf.reduce_mean(turned * turned, axis=means)


def along(vector, axis, tensor):
    """The vector reshaped to multiply `tensor` along an axis."""
    return tf.reshape(vector, [-1 if k == axis else 1 for k in range(tensor.shape.rank)])
