"""The Kronecker geometry of PSGD: a factor for each axis of a weight; see `solvers/whitening.py` for the criterion."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_curvature.component import check_count, check_number, register
from keras_curvature.operators import Function, LinearOperator, axes
from keras_curvature.solvers.whitening import Draws, Geometry, Spec, all_or_none
from keras_curvature.typing import Shape, Vector


@register
@dataclasses.dataclass(frozen=True)
class KroneckerGeometry(Geometry):
    """A factor for each axis of each weight: `Q = Q_1 x Q_2 x ...`, in the geometry `dQ = Q^0.5 E Q^1.5`.

        T_k = (P h) (P h)' unfolded along axis k          S_k = v v' along axis k, or its mean (n / n_k) I
        Q_k <- Q_k - mu/L_k (T_k - S_k) Q_k               and a small rotation towards a symmetric Q_k

    with `n` the entries of the weight and `n_k` those of the axis. No matrix is inverted or factorized. An axis that is
    too long (`max_size`, `max_skew`) gets a diagonal factor; axes of length one get none.

    Reference: Li, "Stochastic Hessian fittings with Lie groups" (arXiv:2402.11858), and `psgd.py` of the author's
    psgd_torch, `dQ = "Q0.5EQ1.5"`.

    Args:
        rate, beta, damping, initial: See `Geometry`.
        max_size: Longest axis with a full factor, an integer; `None`: no limit. Defaults to `None` (the reference).
        max_skew: Most entries of a full factor, in entries of the weight. Defaults to `1.0` (the reference): no factor
            has more entries than the weight.

    Example: `PSGD(geometry=KroneckerGeometry(max_size=1024))`
    """

    max_size: int | None = None
    max_skew: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.max_size is not None:
            check_count(self, "max_size", self.max_size)
        check_number(self, "max_skew", self.max_skew, low=0)

    def specs(self, shapes: list[Shape]) -> list[Spec]:
        """For each weight, `L` with an entry for each axis, and the factors."""
        return [spec for i, shape in enumerate(shapes) for spec in self._specs(i, lengths(shape))]

    def _specs(self, i, own):
        def identity(shape, dtype):
            return tf.eye(shape[0], dtype=dtype)

        bound = (f"L_{i}", (len(own),), "zeros")
        full = [self._is_full(n, math.prod(own)) for n in own]
        kinds = [((n, n), identity) if f else ((n,), "ones") for n, f in zip(own, full)]
        return [bound, *[(f"Q_{i}_{k}", *kind) for k, kind in enumerate(kinds)]]

    def _is_full(self, length, entries):
        fits = self.max_size is None or length <= self.max_size
        return length > 1 and fits and length**2 <= self.max_skew * entries

    def fitted(self, state: Vector, v: Vector | None, h: Vector, draws: Draws) -> Vector:
        """One step for every weight."""
        weights = _by_weight(state, [a.shape for a in h])
        begins = [tf.equal(L[0], 0) for L, *_ in weights]
        scale, fitted = self._scale(tf.reduce_any(begins), v, h), []
        for i, (L, *Q) in enumerate(weights):
            (a,) = self._noisy([h[i]], draws.normal_like([h[i]]))
            started = tf.where(begins[i], scale ** (1 / len(Q)), tf.ones_like(scale))
            probe = None if v is None else tf.reshape(v[i], lengths(v[i].shape))
            new = self._fit(L, [started * q for q in Q], probe, tf.reshape(a, lengths(a.shape)), draws)
            fitted += all_or_none(new)
        return fitted

    def _fourth_moment(self, h):
        return tf.reduce_max([tf.reduce_mean(tf.square(tf.square(a))) for a in h])

    def _fit(self, L, Q, v, h, draws):
        Ph, bounds, factors = precondition(Q, h), [], []
        for k, q in enumerate(Q):
            T = _moment(Ph, k, q)
            if v is None:  # S is its mean, a multiple of the identity
                S = math.prod(h.shape) / h.shape[k]
                size = _norm(T, draws) + S
                change = _times(T, q) - S * q
            else:
                S = _moment(v, k, q)
                size = _norm(T + S, draws)
                change = _times(T - S, q)
            bounds.append(self._bound(L[k], size))
            q = q - self.rate / bounds[-1] * change
            factors.append(q if q.shape.rank == 1 else rotate(q, draws))
        # at random, one step in 100: only the product of the factors' scales is determined
        return [tf.stack(bounds), *_balance(factors, draws.uniform(h.dtype) < 0.01)]

    def operator(self, state: Vector, shapes: list[Shape]) -> LinearOperator:
        """`P = Q'Q`."""
        factors = [Q for _, *Q in _by_weight(state, shapes)]

        def product(vector):
            parts = [precondition(Q, tf.reshape(a, lengths(a.shape))) for Q, a in zip(factors, vector)]
            return [tf.reshape(part, a.shape) for part, a in zip(parts, vector)]

        return Function(product, psd=True)

    def groups(self, vector: Vector) -> list[Vector]:
        """Each weight on its own."""
        return [[a] for a in vector]


def lengths(shape):
    """The lengths of the axes that get a factor: all axes longer than one, and at least one axis."""
    return [n for n in shape if n != 1] or [1]


def _by_weight(state, shapes):
    """`[L, Q_1, Q_2, ...]` for each weight, from the flat list."""
    flat = iter(state)
    return [[next(flat) for _ in range(1 + len(lengths(shape)))] for shape in shapes]


def precondition(Q, tensor):
    """`Q'Q` times a tensor, along all its axes."""
    full = [q if q.shape.rank == 2 else None for q in Q]
    tensor = axes.multiply_transposed(axes.multiply(tensor, full), full)
    for k, q in enumerate(Q):
        if q.shape.rank == 1:
            tensor *= tf.reshape(tf.square(q), [-1] + [1] * (tensor.shape.rank - 1 - k))
    return tensor


def _moment(tensor, k, q):
    """The tensor times itself over all axes but one, as a matrix, or its diagonal for a diagonal factor."""
    if q.shape.rank == 2:
        return axes.second_moment(tensor, k)
    return tf.reduce_sum(tf.square(tensor), [i for i in range(tensor.shape.rank) if i != k])


def _times(T, q):
    return T * q if q.shape.rank == 1 else tf.matmul(T, q)


def _norm(T, draws):
    """The largest entry of a diagonal; for a matrix `T >= 0` a lower bound of the largest eigenvalue."""
    if T.shape.rank == 1:
        return tf.reduce_max(T)
    return norm_bound(T, tf.reduce_max(tf.linalg.diag_part(T)), draws)


def norm_bound(A, largest, draws, width=32):
    """A lower bound of the spectral norm of a symmetric or antisymmetric matrix: four products with a few rows.

    The rows begin as noise around the longest row of `A`. `largest` is the size of an entry, for scaling.
    """
    tiny = np.finfo(A.dtype.as_numpy_dtype).tiny
    largest = largest + tiny
    A = A / largest
    longest = A[tf.argmax(tf.reduce_sum(tf.square(A), 1))]
    noise = draws.normal((width, A.shape[0]), A.dtype)
    rows = longest + tf.sign(tf.linalg.matvec(noise, longest))[:, tf.newaxis] * noise
    for _ in range(2):
        rows = tf.matmul(rows, A)
        rows = tf.matmul(rows / (tf.norm(rows, axis=1, keepdims=True) + tiny), A)
    return largest * tf.reduce_max(tf.norm(rows, axis=1))


def rotate(Q, draws, longest=1 / 8):
    """`Q` turned a little towards a symmetric matrix: a step of the orthogonal Procrustes problem `min |U Q - I|`.

    `U = I + a R + (a R)^2 / 2` with `R = Q' - Q` scaled to norm one, a rotation up to `a^4 / 4`. `a` minimizes
    `|U Q - I|` and is at most `longest`. `Q'Q` does not change.
    """
    R = tf.transpose(Q) - Q
    R = R / (norm_bound(R, tf.reduce_max(tf.abs(R)), draws) + np.finfo(R.dtype.as_numpy_dtype).tiny)
    RQ = tf.matmul(R, Q)
    RRQ = tf.matmul(R, RQ)
    slope, curvature = tf.linalg.trace(RQ), tf.linalg.trace(RRQ)
    a = tf.where(curvature < 0, tf.minimum(-slope / curvature, longest), tf.constant(longest, Q.dtype))
    return Q + a * (RQ + 0.5 * a * RRQ)


def _balance(Q, now):
    """If `now`, factors rescaled to equal largest entries."""
    if len(Q) == 1:
        return Q
    sizes = tf.stack([tf.reduce_max(tf.abs(q)) for q in Q])
    changes = tf.where(now, tf.reduce_prod(sizes) ** (1 / len(Q)) / sizes, tf.ones_like(sizes))
    return [q * changes[k] for k, q in enumerate(Q)]
