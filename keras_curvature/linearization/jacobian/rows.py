"""The classes `Rows` and `FisherRows`: what `Linearization.rows` and `fisher_rows` return."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.jacobian import roots
from keras_curvature.linearization.jacobian.frames import OfOutputs, of_fisher
from keras_curvature.linearization.jacobian.matrix import MEMORY, RowMatrix
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Vector

# Central differences of second order: for each derivative the weight of the center, and those of the points beside it.
STENCILS = {
    2: (-2.0, {1: 1.0, -1: 1.0}),
    3: (0.0, {2: 0.5, 1: -1.0, -1: 1.0, -2: -0.5}),
    4: (6.0, {2: 1.0, 1: -4.0, -1: -4.0, -2: 1.0}),
}


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

    def bent(self, vector: Vector, *more: Vector, h: float | None = None) -> tf.Tensor:
        """`R` times a derivative of the outputs along a path, `(N,)`, by central differences.

            R d^k/dt^k z(w + t v + t^2/2 v_2 + ... )  at t = 0,      k = 2 with v alone, 3 with v and v_2, or 4

        Costs two forward passes for k = 2, and four for the others.

        Args:
            vector: `v`, a vector.
            *more: `v_2` and `v_3`, vectors. Defaults to none, a straight path.
            h: Distance in `t` of neighbouring points. Defaults to `0.1` for k = 2 and to `0.2` for the others.
        """

        def question(recorded, *sides):
            return [root.times(t) for root, t in zip(roots.roots(recorded), differences(recorded, sides))]

        points, differences = self._along([vector, *more], h)
        return self._gathered(self._lin.passes.rows(question, tangents=points), 1)

    def pulled_bent(self, vector: Vector, *more: Vector, h: float | None = None) -> Vector:
        """`A' bent(v, ...)`, a vector, for which no root is needed: the passes of `bent` and one backward pass."""

        def question(recorded, *sides):
            return recorded.pull(recorded.curve(differences(recorded, sides)))

        points, differences = self._along([vector, *more], h)
        return self._lin.passes.total(question, tangents=points)

    def _along(self, path, h):
        """The leaves at the points of the stencil, on every replica, and the function that takes their difference."""
        path = [trees.vector("vector", v, self._lin.variables) for v in path]
        order = len(path) + 1
        if order not in STENCILS:
            raise ValueError(f"`bent` takes one to three vectors. Received: {len(path)} vectors")
        h = (0.1 if order == 2 else 0.2) if h is None else h
        center, sides = STENCILS[order]

        def differences(recorded, leaves):
            def difference(i, leaf):
                terms = [weight * at[i] for weight, at in zip(sides.values(), leaves)]
                return tf.add_n([*terms, center * leaf] if center else terms) / h**order

            return [difference(i, leaf) for i, leaf in zip(recorded.used, recorded.leaves)]

        shifted = self._lin.record(
            lambda pure, weights: _Shifted(pure, [trees.add(weights, trees.along(path, t * h)) for t in sides])
        )
        return list(shifted.rows(lambda shifted: shifted.leaves)), differences

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
    """The leaves of the model at several weights, as a record of a forward pass."""

    def __init__(self, pure, points):
        evaluations = [pure.evaluate(weights) for weights in points]
        self.evaluation, self.leaves = evaluations[0], tuple(e.leaves for e in evaluations)
