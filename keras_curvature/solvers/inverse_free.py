"""Factors of inverses that follow their matrices by products: `K K' ~ A^-1`, `C C' ~ G^-1`, or one for each axis.

A step of Riemannian gradient descent in `K`, in coordinates in which it is a step by `K M_K`; see `optimizers/singd.py`
for the equations and the reference. All functions take stacks along one leading axis. A multiple of the identity, `K =
C = k I`, is a fixed point for multiples of the identity `A = a I`, `G = g I` if

    k^4 (a g + damping) = 1           with the traces
    k^2 (a + damping) = 1             without, and likewise for C
"""

import dataclasses
import math

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.operators import axes


@dataclasses.dataclass(frozen=True)
class InverseFree:
    """One change of the factors.

    Args:
        damping, alpha, rate, traces: See `SINGD`.
    """

    damping: float
    alpha: float
    rate: float
    traces: bool

    def moved(self, A, G, K, C, M_K, M_C, first):
        """The next `(K, C, M_K, M_C)`; where `first`, from the multiples of the identity that fit.

        `K` may be a diagonal beside a diagonal or a matrix `A`, and `C` likewise. `first` is a scalar, or, for stacks,
        one for each.
        """
        lead, damping = first.shape.rank, trees.exactly(self.damping, K.dtype)
        K, C = self._begun(A, G, K, C, first)
        H_K, H_C = _inner(K, lead, A), _inner(C, lead, G)
        S_K, S_C = _inner(K, lead), _inner(C, lead)

        def change(M, H, S, other_H, other_S):
            of_H, of_S = (_mean(other_H, lead), _mean(other_S, lead)) if self.traces else (1.0, damping)
            of_S = damping * of_S if self.traces else of_S
            drift = _times(of_H, H) + _times(of_S, S)
            return self.alpha * M + 0.5 * _shifted(drift, lead, -1.0)

        M_K, M_C = change(M_K, H_K, S_K, H_C, S_C), change(M_C, H_C, S_C, H_K, S_K)
        return _step(K, M_K, self.rate, lead), _step(C, M_C, self.rate, lead), M_K, M_C

    def moved_entries(self, f, k, m, first):
        """The next `(k, m)` with `k^2 ~ 1 / (f + damping)`, each entry for itself; `first` is a scalar."""
        target = f + trees.exactly(self.damping, f.dtype)
        k = tf.where(first, tf.math.rsqrt(target), k)
        m = self.alpha * m + 0.5 * (k * k * target - 1.0)
        return k - self.rate * k * m / tf.maximum(tf.abs(m), 1.0), m

    def _begun(self, A, G, K, C, first):
        lead, damping = first.shape.rank, trees.exactly(self.damping, K.dtype)
        a, g = _mean(A, lead), _mean(G, lead)
        if self.traces:
            k = c = tf.math.rsqrt(tf.sqrt(a * g + damping))
        else:
            k, c = tf.math.rsqrt(a + damping), tf.math.rsqrt(g + damping)
        fitting = (_shifted(tf.zeros_like(X), lead, _like(x, X)) for x, X in ((k, K), (c, C)))
        return tuple(tf.where(_like(first, X), fit, X) for fit, X in zip(fitting, (K, C)))


@dataclasses.dataclass(frozen=True)
class InverseFreeAxes:
    """One change of the factors of the axes of a tensor; see `optimizers/if_shampoo.py`.

    All factors `k I` are a fixed point for a gradient whose squares have the mean `g`, if `k^(2 m) (g + damping) = 1`,
    with `m` the number of factors.

    Args:
        damping, beta, rate: See `IFShampoo`.
        longest: Longest axis with a factor.
    """

    damping: float
    beta: float
    rate: float
    longest: int

    def moved(self, T, K, M, first):
        """The next `(K, M)`, lists with a matrix for each axis that has one, in order.

        Args:
            T: The gradient, or a stack of them.
            K, M: The factors and their momenta.
            first: Whether to begin at the multiples of the identity that fit, a scalar or one for each of a stack.
        """
        lead, damping = first.shape.rank, trees.exactly(self.damping, T.dtype)
        own = T.shape[lead:]
        square = tf.reduce_mean(tf.square(T), list(range(lead, T.shape.rank)))
        k = tf.pow(square + damping, -0.5 / len(K))
        K = [tf.where(_like(first, X), _shifted(tf.zeros_like(X), lead, _like(k, X)), X) for X in K]
        places = [axis for axis, n in enumerate(own) if n <= self.longest]
        along = [None] * len(own)
        for axis, X in zip(places, K):
            along[axis] = X
        Z = axes.multiply_transposed(T, along, lead)
        S = [_inner(X, lead) for X in K]
        sizes = [_mean(X, lead) for X in S]
        found = []
        for i, (axis, X, m) in enumerate(zip(places, S, M)):
            others = damping * math.prod([s for j, s in enumerate(sizes) if j != i], start=tf.ones_like(damping))
            H = axes.second_moment(Z, axis, lead) * (own[axis] / math.prod(own))
            drift = _shifted(H + _like(tf.broadcast_to(others, first.shape), X) * X, lead, -1.0)
            found.append(self.beta * m + 0.5 * (1.0 - self.beta) * drift)
        return [_step(X, m, self.rate, lead) for X, m in zip(K, found)], found


def _step(K, M, rate, lead):
    # shorter than `rate` in the spectral norm: `I - rate M / |M|` stays invertible
    size = tf.sqrt(tf.reduce_sum(tf.square(M), list(range(lead, M.shape.rank)), keepdims=True))
    change = M * (rate / tf.maximum(size, 1.0))
    return K - (K * change if _is_diagonal(K, lead) else tf.matmul(K, change))


def _is_diagonal(X, lead):
    return X.shape.rank == lead + 1


def _inner(K, lead, A=None):
    """`K'A K`, or `K'K`; for a diagonal `K` its diagonal."""
    if not _is_diagonal(K, lead):
        return tf.matmul(K, K if A is None else tf.matmul(A, K), transpose_a=True)
    if A is None:
        return K * K
    return K * K * (A if _is_diagonal(A, lead) else tf.linalg.diag_part(A))


def _mean(X, lead):
    """The mean of the diagonal."""
    return tf.reduce_mean(X if _is_diagonal(X, lead) else tf.linalg.diag_part(X), -1)


def _like(x, X):
    """A scalar for each of a stack, for products with it."""
    return tf.reshape(x, [*x.shape, *[1] * (X.shape.rank - x.shape.rank)])


def _times(x, X):
    return x * X if isinstance(x, float) else _like(x, X) * X


def _shifted(X, lead, x):
    """`X + x I`."""
    if _is_diagonal(X, lead):
        return X + x
    return X + x * tf.eye(X.shape[-1], dtype=X.dtype)
