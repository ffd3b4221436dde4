"""The generalized Gauss-Newton matrix as an operator with access to its factors."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.linearization import products
from keras_curvature.linearization.passes import Passes
from keras_curvature.operators import LinearOperator
from keras_curvature.typing import Scalar, Variables, Vector


@dataclasses.dataclass(frozen=True)
class Tangent:
    """`v` pushed through the model: `J v` and `H_L J v` on every replica, beside `v` itself."""

    vector: Vector
    pushed: Any
    curved: Any


@dataclasses.dataclass(frozen=True)
class GaussNewton(LinearOperator):
    """`v -> J' H_L J v`, with access to its factors. Made by `Linearization.gauss_newton`.

    A quadratic form `u'Gv = (Ju)' H_L (Jv)` needs no backward pass, and `G v + g` needs one instead of two.
    """

    variables: Variables
    passes: Passes
    loss_scale: Scalar | None
    l2: tuple[float, ...]
    not_convex: tuple[str, ...]

    @property
    def psd(self) -> bool:  # type: ignore[override]
        """Whether the compiled loss is convex in the outputs."""
        return not self.not_convex

    def multiply(self, vector: Vector) -> Vector:
        """`G v`: one forward-mode and one backward pass."""
        vector = trees.vector("vector", vector, self.variables)
        product = self.passes.total(lambda recorded, v: recorded.gauss_newton_product(v), [vector])
        return self._add_l2(product, vector)

    def push(self, vector: Vector) -> Tangent:
        """The `Tangent` of `vector`: one forward-mode pass."""
        vector = trees.vector("vector", vector, self.variables)
        pushed, curved = self.passes.rows(lambda recorded, v: recorded.push(v), [vector])
        return Tangent(vector, pushed, curved)

    def pull(self, tangent: Tangent) -> Vector:
        """`G v` of the vector that was pushed: one backward pass."""
        pulled = self.passes.total(lambda recorded, c: recorded.pull(c), tangents=[tangent.curved])
        return self._add_l2(pulled, tangent.vector)

    def pull_with_gradient(self, tangent: Tangent) -> Vector:
        """`G v + g`, the gradient of the quadratic model at `v`: the same one backward pass."""
        pulled = self.passes.total(lambda recorded, c: recorded.gradient(c), tangents=[tangent.curved])
        return self._add_l2(pulled, tangent.vector)

    def inner(self, left: Tangent, right: Tangent) -> tf.Tensor:
        """`u' G v` from two tangents, a scalar: no pass at all."""
        product = replicas.total(lambda u, c: products.inner(u, c, self.loss_scale), left.pushed, right.curved)
        return self._with_l2(product, left, right)

    def gram(self, *tangents: Tangent) -> tf.Tensor:
        """All `u_i' G u_j` of some tangents, a symmetric matrix: no pass, and one sum over the replicas."""
        pairs = [(i, j) for i in range(len(tangents)) for j in range(i, len(tangents))]

        def products_of(pushed, curved):
            return tf.stack([products.inner(pushed[i], curved[j], self.loss_scale) for i, j in pairs])

        found = replicas.total(products_of, [t.pushed for t in tangents], [t.curved for t in tangents])
        entry = {pair: self._with_l2(found[k], *[tangents[i] for i in pair]) for k, pair in enumerate(pairs)}
        rows = range(len(tangents))
        return tf.stack([tf.stack([entry[min(i, j), max(i, j)] for j in rows]) for i in rows])

    def quadratic_form(self, u: Vector, v: Vector) -> tf.Tensor:
        """`u' G v`: two forward-mode passes, one where `u` is `v`."""
        left = self.push(u)
        return self.inner(left, left if v is u else self.push(v))

    def _with_l2(self, product, left, right):
        # in the dtype of the weights' inner products: the outputs may have another one
        product = tf.cast(product, trees.scalar_dtype(left.vector))
        weighted = [(c * u, v) for c, u, v in zip(self.l2, left.vector, right.vector) if c]
        return product + tf.cast(trees.dot(*zip(*weighted)), product.dtype) if weighted else product

    def _add_l2(self, product, vector):
        return [p + c * v if c else p for p, c, v in zip(product, self.l2, vector)]


def require_convex(operator, asked_by, remedy):
    """Refuse a `GaussNewton` of a loss that is not convex in the model's outputs, naming the loss and the remedy."""
    if operator.not_convex:
        raise ValueError(
            f"`{asked_by}` needs a loss that is convex in the model's outputs, for its Gauss-Newton matrix to be "
            f"positive semi-definite. Received: loss={', '.join(operator.not_convex)}. {remedy}"
        )


def l2_of(variables):
    """Second derivative of the L2 weight regularizer of each variable, `tuple` of floats; a subclass counts as `L2`."""

    def coefficient(regularizer):
        known = isinstance(regularizer, (keras.regularizers.L2, keras.regularizers.L1L2))
        return 2.0 * float(regularizer.l2) if known else 0.0

    return tuple(coefficient(getattr(v, "regularizer", None)) for v in variables)
