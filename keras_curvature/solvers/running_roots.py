"""Inverse roots of a running second moment that are updated from the gradients alone, without keeping the moment.

A root `(A + epsilon I)^(-1/p)` of the moment of an axis, `A <- beta A + share T T'`, is stored as a tuple of tensors:
`T`, `(n, m)`, is the gradient with this axis in the rows. All functions take stacks with leading axes. A root that
failed is NaN, as in `roots.py`.
"""

import dataclasses
from typing import Any, ClassVar

import tensorflow as tf

from keras_curvature.component import Component, check_count, check_number, register
from keras_curvature.operators.axes import ScaledSubspace
from keras_curvature.solvers.roots import failed_as_nan, in_units, power
from keras_curvature.typing import Scalar, Shape, Vector


class RunningRoot(Component):
    """Base of the methods; a subclass is a frozen dataclass with these three methods."""

    exponent: ClassVar[None] = None  # the optimizer chooses it

    def state(self, n: int, epsilon: float) -> list[tuple[str, Shape, Any]]:
        """Name, shape and initializer of each tensor of the state for an axis of length `n`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `state(n, epsilon)`.")

    def updated(self, state: Vector, T: tf.Tensor, beta: float, p: float) -> Vector:
        """The next state."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `updated(state, T, beta, p)`.")

    def root(self, state: Vector, correction: Scalar, p: float, epsilon: float) -> tf.Tensor | ScaledSubspace:
        """The root, with which `axes.multiply` multiplies; `correction` is the bias correction of the moment."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `root(state, correction, p, epsilon)`.")


@register
@dataclasses.dataclass(frozen=True)
class SketchedRoot(RunningRoot):
    """A low rank and a multiple of the identity in place of each factor, by frequent directions (Sketchy).

        U diag(s) U' = beta U_old diag(l_old) U_old' + (1 - beta) T T'       all its eigenvalues s_1 >= s_2 >= ...
        l_i = s_i - s_(rank+1),    tail <- beta tail + s_(rank+1)            the largest `rank` are kept
        root = (U diag(l) U' + (tail + epsilon) I)^(-1/p)

    `rank` numbers for each row of an axis are kept in place of `n`. With `rank >= n`, and roots in each step, it is
    Shampoo. The gradients of the steps between two roots are not seen.

    Reference: Feinberg et al., "Sketchy: Memory-efficient adaptive regularization with frequent directions" (2023), and
    github.com/google-research/precondition, `tearfree/sketchy.py`. Differences from that code: (1) Shampoo's averages
    with bias correction (there: no `1 - beta`); (2) `tail` decays by `beta`, as the moment does (there: by its root);
    (3) directions that no gradient had are multiplied by the root of `epsilon` (there: by zero); (4) for more columns
    than rows the eigenvectors of `T T'` (there: a singular value decomposition).

    Args:
        rank: The number of directions that are kept of each axis. Defaults to `128` (the authors).
        relative_epsilon: In units of the largest eigenvalue, added where it exceeds the optimizer's `epsilon`. Defaults
            to `1e-7` (the authors).

    Example: `Shampoo(root=SketchedRoot(64))`
    """

    rank: int = 128
    relative_epsilon: float = 1e-7

    def __post_init__(self):
        check_count(self, "rank", self.rank)
        check_number(self, "relative_epsilon", self.relative_epsilon, low=0)

    def state(self, n: int, epsilon: float) -> list[tuple[str, Shape, Any]]:
        k = min(self.rank, n)
        return [("directions", (n, k), "zeros"), ("eigenvalues", (k,), "zeros"), ("tail", (), "zeros")]

    def updated(self, state: Vector, T: tf.Tensor, beta: float, p: float) -> Vector:
        U, values, tail = state
        k, share = U.shape[-1], 1.0 if beta == 1 else 1.0 - beta
        finite, T = _finite_rows(T)
        sketch = U * tf.sqrt(beta * values)[..., None, :]
        found, vectors = _largest(tf.concat([sketch, share**0.5 * T], axis=-1), k + 1)
        rest = found[..., k:]  # none where `k` is the length of the axis
        cutoff = rest[..., 0] if rest.shape[-1] else tf.zeros_like(tail)
        kept = found[..., :k] - cutoff[..., None]
        new = [vectors[..., :k], kept, beta * tail + cutoff]
        fine = finite[..., 0, 0]
        return [failed_as_nan(finite, new[0]), failed_as_nan(fine[..., None], new[1]), failed_as_nan(fine, new[2])]

    def root(self, state: Vector, correction: Scalar, p: float, epsilon: float) -> ScaledSubspace:
        U, values, tail = state
        values, tail = values / correction, tail / correction
        ridge = tf.maximum(tf.constant(epsilon, tail.dtype), self.relative_epsilon * (values[..., 0] + tail))
        power = tf.constant(-1.0 / p, tail.dtype)
        begun = values[..., 0] + tail > 0  # until then the root is the identity
        outer = tf.where(begun, (tail + ridge) ** power, tf.ones_like(tail))
        inner = tf.where(begun[..., None], (values + (tail + ridge)[..., None]) ** power, tf.ones_like(values))
        return ScaledSubspace(U, inner - outer[..., None], outer)


@register
@dataclasses.dataclass(frozen=True)
class BinomialRoot(RunningRoot):
    """The binomial series of the change, from one root to the next, by products only (Jorge).

        X = (1 - b) / b P^p T T',    b = |Y| / (1 + |Y|),    Y = P^p T T'       so that |X| = 1
        P <- b^(-1/p) P (I - X / p + (p + 1) / (2 p^2) X^2)

    `P` stands for the root of `A <- b A + (1 - b) T T'`: the optimizer's `beta_2` has no part in it. The series has an
    error of 1% where an eigenvalue of `X` is 0.5 and of 8% where it is 1 (`p = 4`). Nothing is
    kept but `P`. The gradients of the steps between two roots are not seen.

    Reference: Singh, Sating and Bhatele, "Jorge: Approximate preconditioning for GPU-efficient second-order
    optimization" (2023). Differences: (1) `P` is made symmetric, which the product is not; (2) `p` is Shampoo's for any
    number of axes (there: 4); (3) the first `P` is `initial I`.

    Args:
        initial: The first `P`, before the first gradient is seen: it is forgotten as gradients come, in directions
            that they have. Defaults to `1`.

    Example: `Shampoo(root=BinomialRoot(), grafting="sgd")`
    """

    initial: float = 1.0

    def __post_init__(self):
        check_number(self, "initial", self.initial, low=0, open_low=True)

    def state(self, n: int, epsilon: float) -> list[tuple[str, Shape, Any]]:
        return [("root", (n, n), lambda shape, dtype: self.initial * tf.eye(n, dtype=dtype))]

    def updated(self, state: Vector, T: tf.Tensor, beta: float, p: float) -> Vector:
        (P,), p = state, round(p)
        finite, T = _finite_rows(T)
        unit, scaled = in_units(T)
        Y = tf.matmul(tf.matmul(power(P, p), scaled), scaled, transpose_b=True)
        size = tf.norm(Y, axis=(-2, -1), keepdims=True)
        X = tf.math.divide_no_nan(Y, size)
        series = tf.eye(P.shape[-1], dtype=P.dtype) - X / p + (p + 1) / (2 * p * p) * tf.matmul(X, X)
        # b^-1 = 1 + 1 / |Y|, and 1 without a gradient, of which nothing is learnt
        growth = 1.0 + tf.math.divide_no_nan(tf.ones_like(size), size * unit * unit)
        new = growth ** tf.constant(1.0 / p, P.dtype) * tf.matmul(P, series)
        return [failed_as_nan(finite, 0.5 * (new + tf.linalg.matrix_transpose(new)))]

    def root(self, state: Vector, correction: Scalar, p: float, epsilon: float) -> tf.Tensor:
        return state[0]


def _finite_rows(T):
    """Which matrices `(..., n, m)` are finite, `(..., 1, 1)`, and the stack with zeros for the others."""
    finite = tf.reduce_all(tf.math.is_finite(T), axis=(-2, -1), keepdims=True)
    return finite, tf.where(finite, T, tf.zeros_like(T))


def _largest(M, count):
    """The largest `count` eigenvalues of `M M'`, the largest first, and their eigenvectors; at most all."""
    n, columns = M.shape[-2:]
    unit, M = in_units(M)
    if columns < n:
        s, vectors, _ = tf.linalg.svd(M)
        values = s * s
    else:
        values, vectors = tf.linalg.eigh(tf.matmul(M, M, transpose_b=True))
        values, vectors = tf.maximum(tf.reverse(values, [-1]), 0.0), tf.reverse(vectors, [-1])
    return values[..., :count] * tf.squeeze(unit, -1) ** 2, vectors[..., :count]
