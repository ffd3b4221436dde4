"""The Kronecker geometry of PSGD: a factor for each axis of a weight; see `solvers/whitening.py` for the criterion."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_curvature.component import check_count, check_number, register
from keras_curvature.operators import Function, LinearOperator, axes
from keras_curvature.solvers.whitening import Draws, Geometry, Spec
from keras_curvature.typing import Shape, Vector

WIDTH = 32  # rows of the products that find a norm (the reference)


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
        check_count(self, "max_size", self.max_size, or_none=True)
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
        """One step for every weight; weights of one shape take it together, which keeps the graph small."""
        alike = _Alike([a.shape for a in h])
        states, hs = alike.stacked_state(state), alike.stacked(h)
        vs = [None] * len(hs) if v is None else alike.stacked(v)
        begins = tf.reduce_any(tf.equal(tf.concat([tf.reshape(L, [-1]) for L, *_ in states], 0), 0))
        scale = self._scale(begins, v, hs)
        return alike.flat_state([self._fit(*own, scale, draws) for own in zip(states, hs, vs)])

    def _fourth_moment(self, h):
        """The largest over the weights, which are stacked along the first axes."""
        fourth = [tf.reduce_mean(tf.square(tf.square(a)), list(range(1, a.shape.rank))) for a in h]
        return tf.reduce_max(tf.concat(fourth, 0))

    def _fit(self, state, h, v, scale, draws):
        """The next `[L, Q_1, Q_2, ...]` of some weights of one shape; all tensors are stacked."""
        (L, *Q), (noise, *rows) = state, _normals(draws, h, state[1:])
        L, rows, (h,) = tf.unstack(L, axis=1), iter(rows), self._noisy([h], [noise])
        started = tf.where(tf.equal(L[0], 0), scale ** (1 / len(Q)), tf.ones_like(scale))
        Q = [_each(started, q) * q for q in Q]
        Ph, bounds, factors = precondition(Q, h), [], []
        for k, q in enumerate(Q):
            T = _moment(Ph, k, q)
            if v is None:  # S is its mean, a multiple of the identity
                S = math.prod(h.shape[1:]) / h.shape[k + 1]
                size = _norm(T, rows) + S
                change = _times(T, q) - S * q
            else:
                S = _moment(v, k, q)
                size = _norm(T + S, rows)
                change = _times(T - S, q)
            bounds.append(self._bound(L[k], size))
            q = q - _each(self.rate / bounds[-1], q) * change
            factors.append(rotate(q, next(rows)) if _is_matrix(q) else q)
        # at random, one step in 100: only the product of the factors' scales is determined
        factors = _balance(factors, draws.uniform(h.dtype, h.shape[:1]) < 0.01)
        return _all_or_none([tf.stack(bounds, 1), *factors])

    def operator(self, state: Vector, shapes: list[Shape]) -> LinearOperator:
        """`P = Q'Q`."""
        alike = _Alike(shapes)
        factors = [Q for _, *Q in alike.stacked_state(state)]

        def product(vector):
            return alike.flat([precondition(Q, a) for Q, a in zip(factors, alike.stacked(vector))], vector)

        return Function(product, psd=True)

    def groups(self, vector: Vector) -> list[Vector]:
        """Each weight on its own."""
        return [[a] for a in vector]


def lengths(shape):
    """The lengths of the axes that get a factor: all axes longer than one, and at least one axis."""
    return [n for n in shape if n != 1] or [1]


class _Alike:
    """Vectors and states as stacks: one for all weights of one shape, along a new first axis.

    Args:
        shapes: The shapes of the weights. Axes of length one do not count.
    """

    def __init__(self, shapes):
        self._shapes, self._groups = [tuple(lengths(shape)) for shape in shapes], {}
        for i, shape in enumerate(self._shapes):
            self._groups.setdefault(shape, []).append(i)

    def stacked(self, vector):
        """The stacks of a vector, a list of tensors `(weights, ...)` without axes of length one."""
        shaped = [a if tuple(a.shape) == own else tf.reshape(a, own) for a, own in zip(vector, self._shapes)]
        return [tf.stack([shaped[i] for i in group]) for group in self._groups.values()]

    def flat(self, stacks, like):
        """The vector whose stacks are given, in the shapes of `like`."""
        found = self._in_order([tf.unstack(stack) for stack in stacks])
        return [a if a.shape == b.shape else tf.reshape(a, b.shape) for a, b in zip(found, like)]

    def stacked_state(self, state):
        """The stacks of a state, a list of `[L, Q_1, Q_2, ...]`."""
        flat = iter(state)
        weights = [[next(flat) for _ in range(1 + len(shape))] for shape in self._shapes]
        return [[tf.stack(each) for each in zip(*[weights[i] for i in group])] for group in self._groups.values()]

    def flat_state(self, stacks):
        """The state whose stacks are given, a flat list."""
        weights = self._in_order([zip(*[tf.unstack(each) for each in stack]) for stack in stacks])
        return [tensor for weight in weights for tensor in weight]

    def _in_order(self, groups):
        found = {i: one for group, own in zip(self._groups.values(), groups) for i, one in zip(group, own)}
        return [found[i] for i in range(len(found))]


def _is_matrix(q):
    """Whether the factors of an axis are matrices, and not diagonals."""
    return q.shape.rank == 3


def _each(numbers, like):
    """A number for each weight, or one for all, to multiply `like` with."""
    return tf.reshape(numbers, [-1] + [1] * (like.shape.rank - 1))


def _normals(draws, h, Q):
    """The noise of `h`, and for each full factor the rows of two norms, all of one weight after those of another."""
    wide = [(WIDTH, q.shape[1]) for q in Q if _is_matrix(q) for _ in range(2)]
    shapes = [h.shape[1:], *wide]
    sizes = [math.prod(shape) for shape in shapes]
    parts = tf.split(draws.normal((h.shape[0], sum(sizes)), h.dtype), sizes, 1)
    return [tf.reshape(part, [h.shape[0], *shape]) for part, shape in zip(parts, shapes)]


def precondition(Q, tensor):
    """`Q'Q` times tensors, along all their axes."""
    full = [q if _is_matrix(q) else None for q in Q]
    tensor = axes.multiply_transposed(axes.multiply(tensor, full, 1), full, 1)
    for k, q in enumerate(Q):
        if not _is_matrix(q):
            own = [n if i in (0, k + 1) else 1 for i, n in enumerate(tensor.shape)]
            tensor *= tf.reshape(tf.square(q), own)
    return tensor


def _moment(tensor, k, q):
    """The tensors times themselves over all axes but one, as matrices, or their diagonals for a diagonal factor."""
    if _is_matrix(q):
        return axes.second_moment(tensor, k, 1)
    return tf.reduce_sum(tf.square(tensor), [i for i in range(1, tensor.shape.rank) if i != k + 1])


def _times(T, q):
    return tf.matmul(T, q) if _is_matrix(q) else T * q


def _norm(T, rows):
    """The largest entries of diagonals; for matrices `T >= 0` lower bounds of the largest eigenvalues."""
    if not _is_matrix(T):
        return tf.reduce_max(T, 1)
    return norm_bound(T, tf.reduce_max(tf.linalg.diag_part(T), 1), next(rows))


def norm_bound(A, largest, noise):
    """A lower bound of the spectral norm of symmetric or antisymmetric matrices: four products with a few rows.

    The rows begin as noise around the longest row of a matrix. `largest` is the size of an entry, for scaling.
    """
    tiny = np.finfo(A.dtype.as_numpy_dtype).tiny
    largest = largest + tiny
    A = A / _each(largest, A)
    longest = tf.gather(A, tf.argmax(tf.reduce_sum(tf.square(A), 2), 1), axis=1, batch_dims=1)
    rows = tf.expand_dims(longest, 1) + tf.sign(tf.matmul(noise, tf.expand_dims(longest, 2))) * noise
    for _ in range(2):
        rows = tf.matmul(rows, A)
        rows = tf.matmul(rows / (tf.norm(rows, axis=2, keepdims=True) + tiny), A)
    return largest * tf.reduce_max(tf.norm(rows, axis=2), 1)


def rotate(Q, noise, longest=1 / 8):
    """`Q` turned a little towards a symmetric matrix: a step of the orthogonal Procrustes problem `min |U Q - I|`.

    `U = I + a R + (a R)^2 / 2` with `R = Q' - Q` scaled to norm one, a rotation up to `a^4 / 4`. `a` minimizes
    `|U Q - I|` and is at most `longest`. `Q'Q` does not change.
    """
    R = tf.linalg.matrix_transpose(Q) - Q
    size = norm_bound(R, tf.reduce_max(tf.abs(R), [1, 2]), noise)
    R = R / _each(size + np.finfo(R.dtype.as_numpy_dtype).tiny, R)
    RQ = tf.matmul(R, Q)
    RRQ = tf.matmul(R, RQ)
    slope, curvature = tf.linalg.trace(RQ), tf.linalg.trace(RRQ)
    a = _each(tf.where(curvature < 0, tf.minimum(-slope / curvature, longest), tf.constant(longest, Q.dtype)), Q)
    return Q + a * (RQ + 0.5 * a * RRQ)


def _balance(Q, now):
    """Where `now`, factors rescaled to equal largest entries."""
    if len(Q) == 1:
        return Q
    sizes = tf.stack([tf.reduce_max(tf.abs(q), list(range(1, q.shape.rank))) for q in Q])  # (factors, weights)
    changes = tf.where(now, tf.reduce_prod(sizes, 0) ** (1 / len(Q)) / sizes, tf.ones_like(sizes))
    return [q * _each(change, q) for q, change in zip(Q, tf.unstack(changes))]


def _all_or_none(state):
    """The state of each weight, or all NaN if an entry of it is not finite; see `whitening.all_or_none`."""
    finite = [tf.reduce_all(tf.math.is_finite(a), list(range(1, a.shape.rank))) for a in state]
    finite = tf.reduce_all(tf.stack(finite), 0)
    return [tf.where(_each(finite, a), a, tf.constant(float("nan"), a.dtype)) for a in state]
