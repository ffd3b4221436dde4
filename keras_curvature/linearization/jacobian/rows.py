"""The classes `Rows` and `FisherRows`: what `Linearization.rows` and `fisher_rows` return."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.jacobian import roots
from keras_curvature.linearization.jacobian.frames import OfOutputs, of_fisher
from keras_curvature.linearization.jacobian.matrix import MEMORY, RowMatrix
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Vector


class Rows(RowMatrix):
    """`A = R J`, with a row for each output of each example, and the residuals `r`; made by `Linearization.rows`.

        A'A = J' H_L J     the Gauss-Newton matrix, without what L2 regularizers add
        A'r                the gradient, where the loss is a sum of squares and nothing is added to it (`is_exact`)

    See `RowMatrix` for the order of the rows and for products. For other losses than squares, `R'r` is the part of the
    slope that is in the range of `R'`; `remainder()` is what the gradient has besides.
    """

    def __init__(self, lin, memory=MEMORY):
        super().__init__(lin, self._noting, memory, type(lin).rows)
        self._exact = None

    @property
    def residual(self) -> tf.Tensor:
        """`r`, `(N,)`."""
        return self._flat_parts()

    @property
    def is_exact(self) -> bool:
        """Whether `A'r` is the gradient: the loss is a sum of squares, without regularizers or added losses."""
        self._parts()
        return self._exact

    def remainder(self) -> Vector | None:
        """The gradient minus `A'r`, a vector; `None` if that is zero because `is_exact`."""
        if self.is_exact:
            return None
        return trees.subtract(self._lin.gradient, self.transposed(self.residual))

    def bent(self, vector: Vector, h: float = 0.1) -> tf.Tensor:
        """`R` times the second derivative of the outputs along `v`, `(N,)`; two forward passes.

            R (z(w + h v) - 2 z(w) + z(w - h v)) / h^2

        Args:
            vector: `v`, a vector.
            h: Share of `v` to go to either side. Defaults to `0.1`.
        """
        def question(recorded, *sides):
            return [root.times(t) for root, t in zip(roots.roots(recorded), _second_difference(recorded, *sides, h))]

        return self._gathered(self._lin.passes.rows(question, tangents=self._on_both_sides(vector, h)), 1)

    def pulled_bent(self, vector: Vector, h: float = 0.1) -> Vector:
        """`A' bent(v)`, a vector, for which no root is needed: two forward passes and one backward pass."""

        def question(recorded, *sides):
            return recorded.pull(recorded.curve(_second_difference(recorded, *sides, h)))

        return self._lin.passes.total(question, tangents=self._on_both_sides(vector, h))

    def _on_both_sides(self, vector, h):
        """All leaves at `w + h v` and at `w - h v`, on every replica."""
        vector = trees.vector("vector", vector, self._lin.variables)
        shifted = self._lin.record(lambda pure, weights: _Shifted(pure, weights, vector, h))
        return list(shifted.rows(lambda shifted: (shifted.after, shifted.before)))

    def _noting(self, recorded):
        """The frame of a `Pass`; notes whether the rows make up the gradient."""
        regularized = any(getattr(v, "regularizer", None) is not None for v in self._lin.variables)
        self._exact = roots.are_squares(recorded) and not (regularized or recorded.evaluation.has_added)
        return OfOutputs(recorded)


class FisherRows(RowMatrix):
    """Rows `S` whose squares sum to a Fisher matrix, `F = S'S`; made by `Linearization.fisher_rows`.

    To a solver for Gauss-Newton steps they have residuals of zero, and the gradient as their remainder.

    Args:
        lin, kind, seed, memory: See `Linearization.fisher_rows`.
        gradient: The gradient, for `remainder()`. Defaults to that of `lin`.
    """

    def __init__(self, lin, kind, seed, memory=MEMORY, gradient=None):
        require(lin, "fisher_rows", "products")
        super().__init__(lin, of_fisher(kind, seed), memory, type(lin).fisher_rows)
        self._gradient = gradient

    @property
    def residual(self) -> tf.Tensor:
        """Zeros, `(N,)`."""
        return self._flat_parts()

    def remainder(self) -> Vector:
        """The gradient, a vector."""
        return self._lin.gradient if self._gradient is None else self._gradient


class _Shifted:
    """The leaves of the model at `w + h v` and at `w - h v`, as a record of a forward pass."""

    def __init__(self, pure, weights, vector, h):
        self.before = pure.evaluate(trees.add(weights, vector, -h)).leaves
        self.evaluation = pure.evaluate(trees.add(weights, vector, h))
        self.after = self.evaluation.leaves


def _second_difference(recorded, after, before, h):
    return [(after[i] - 2.0 * leaf + before[i]) / h**2 for i, leaf in zip(recorded.used, recorded.leaves)]
