"""The low-rank geometry of PSGD: one preconditioner for all weights. `solvers/whitening.py` has the criterion."""

import dataclasses
import math

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, register
from keras_curvature.operators import LinearOperator
from keras_curvature.operators.low_rank import LowRankSquare, columns, gram, times
from keras_curvature.solvers.whitening import Draws, Geometry, Spec, all_or_none
from keras_curvature.typing import Shape, Vector

SIZE = 0.1  # expected |U|^2 and |V|^2 at the start


@register
@dataclasses.dataclass(frozen=True)
class LowRankGeometry(Geometry):
    """One `Q = (I + U V') diag(d)` over all weights, in the geometry `dQ = E Q`.

        a = Q h,   b = Q^-T v
        d <- d - mu/L_d (h P h - v P^-1 v) d                             elementwise
        U <- U - mu/L_U (a a' - b b') V (I + V'U)      or      V <- V - mu/L_V (I + V U') (a a' - b b') U

    Each step updates `U` or `V`, chosen at random. Only `I + V'U`, a matrix `(rank, rank)`, is inverted.

    Reference: Li, "Black box Lie group preconditioners for SGD" (arXiv:2211.04422), and `psgd.py` of the author's
    psgd_torch. Differences from that code: (1) `U` and `V` have an expected squared norm of 0.1 at the start, not an
    exact one; (2) `rank` is capped at the number of weights.

    Args:
        rate, beta, damping, initial: See `Geometry`.
        rank: Number of columns of `U` and of `V`; the memory is `2 rank + 1` copies of the weights. Defaults to `10`
            (the reference).

    Example: `PSGD(geometry=LowRankGeometry(rank=20))`
    """

    rank: int = 10

    def __post_init__(self):
        super().__post_init__()
        check_count(self, "rank", self.rank)

    def specs(self, shapes: list[Shape]) -> list[Spec]:
        """`L`, with an entry for each of `d`, `U` and `V`; then for each weight its rows of `U`, of `V` and of `d`."""
        sizes = [math.prod(shape) for shape in shapes]
        rank = min(self.rank, sum(sizes))
        deviation = math.sqrt(SIZE / (sum(sizes) * rank))

        def noise(seed):
            return lambda shape, dtype: deviation * Draws(seed).normal(shape, dtype)

        matrices = [
            (f"{name}_{i}", (n, rank), noise(2 * i + side))
            for side, name in enumerate("UV") for i, n in enumerate(sizes)
        ]  # fmt: skip
        return [("L", (3,), "zeros"), *matrices, *[(f"d_{i}", (n, 1), "ones") for i, n in enumerate(sizes)]]

    def fitted(self, state: Vector, v: Vector | None, h: Vector, draws: Draws) -> Vector:
        """The state after one step of `d`, and one of `U` or `V`."""
        L, U, V, d = _parts(state)
        begins = tf.equal(L[0], 0)
        scale = self._scale(begins, v, h)
        d = trees.scale(tf.where(begins, scale, tf.ones_like(scale)), d)
        noise = columns(draws.normal_like(h))
        h = self._noisy(columns(h), noise)
        v = noise if v is None else columns(v)  # whitening type: the noise of `h` serves as `v`
        U, V = _balance(U, V)

        P = LowRankSquare(U, V, d)
        inner = tf.eye(U[0].shape[1], dtype=L.dtype) + gram(V, U)
        a = P.root(h)
        Ph = P.transposed_root(a)
        b, inverse_v = _inverse(U, V, d, inner, v)
        L_d, d = self._fit_diagonal(L[0], d, Ph, h, v, inverse_v)
        first = draws.uniform(L.dtype) < 0.5
        L_U, L_V, U, V = tf.cond(
            first, lambda: self._fit_left(L[1:], U, V, a, b, inner), lambda: self._fit_right(L[1:], U, V, a, b)
        )
        return all_or_none([tf.stack([L_d, L_U, L_V]), *U, *V, *d])

    def _fourth_moment(self, h):
        return tf.add_n([tf.reduce_sum(tf.square(tf.square(a))) for a in h]) / trees.count(h)

    def _fit_diagonal(self, L, d, Ph, h, v, inverse_v):
        excess, lack = [p * a for p, a in zip(Ph, h)], [p * a for p, a in zip(inverse_v, v)]
        L = self._bound(L, _largest(excess) + _largest(lack))
        return L, [q - self.rate / L * (e - k) * q for q, e, k in zip(d, excess, lack)]

    def _fit_left(self, L, U, V, a, b, inner):
        Va, Vb = gram(V, a), gram(V, b)  # (rank, 1)
        bound = self._bound(L[0], _size(a, V, Va) + _size(b, V, Vb))
        rate = self.rate / bound
        right, left = rate * tf.matmul(Va, inner, transpose_a=True), rate * tf.matmul(Vb, inner, transpose_a=True)
        U = [u - tf.matmul(x, right) + tf.matmul(y, left) for u, x, y in zip(U, a, b)]
        return bound, L[1], U, V

    def _fit_right(self, L, U, V, a, b):
        Ua, Ub = gram(U, a), gram(U, b)  # (rank, 1)
        bound = self._bound(L[1], _size(a, U, Ua) + _size(b, U, Ub))
        rate = self.rate / bound
        inner = rate * (tf.matmul(Ua, Ua, transpose_b=True) - tf.matmul(Ub, Ub, transpose_b=True))
        right, left = rate * tf.transpose(Ua), rate * tf.transpose(Ub)
        V = [q - tf.matmul(x, right) + tf.matmul(y, left) - tf.matmul(q, inner) for q, x, y in zip(V, a, b)]
        return L[0], bound, U, V

    def operator(self, state: Vector, shapes: list[Shape]) -> LinearOperator:
        """`P = Q'Q`."""
        _, U, V, d = _parts(state)
        return LowRankSquare(U, V, d)

    def groups(self, vector: Vector) -> list[Vector]:
        """All weights together."""
        return [vector]


def _parts(state):
    """`(L, U, V, d)` from the flat list of the state."""
    L, *rows = state
    count = len(rows) // 3
    return L, rows[:count], rows[count : 2 * count], rows[2 * count :]


def _balance(U, V):
    """`U A` and `V A^-1` (to fourth order), with a symmetric `A` that makes `U'U` and `V'V` more alike."""
    UU, VV = gram(U, U), gram(V, V)
    left, right = tf.linalg.trace(UU), tf.linalg.trace(VV)
    scale = (left / right) ** (1 / 4)
    UU, VV, left, right = UU / scale**2, VV * scale**2, left / scale**2, right * scale**2
    E = 0.1 * (UU - VV) / (left + right)
    identity, half = tf.eye(E.shape[0], dtype=E.dtype), 0.5 * tf.matmul(E, E)
    return times(U, (identity - E + half) / scale), times(V, (identity + E + half) * scale)


def _inverse(U, V, d, inner, v):
    """`Q^-T v` and `P^-1 v = Q^-1 Q^-T v`, by solving with `inner = I + V'U`."""
    # a finite `inner` is never singular; for another one TensorFlow's solver would raise
    finite = tf.reduce_all(tf.math.is_finite(inner))
    inner = tf.where(finite, inner, tf.eye(inner.shape[0], dtype=inner.dtype))
    b = [a / q for a, q in zip(v, d)]
    b = trees.subtract(b, times(V, tf.linalg.solve(inner, gram(U, b), adjoint=True)))
    inverse = trees.subtract(b, times(U, tf.linalg.solve(inner, gram(V, b))))
    return b, [a / q for a, q in zip(inverse, d)]


def _largest(vector):
    return tf.reduce_max([tf.reduce_max(tf.abs(a)) for a in vector])


def _size(a, A, Aa):
    """`|a| |A A'a|`, from `A'a`."""
    return trees.norm(a) * trees.norm(times(A, Aa))
