"""Factors of inverses that follow their matrices by products: `K K' ~ A^-1`, `C C' ~ G^-1`.

A step of Riemannian gradient descent in `K`, in coordinates in which it is a step by `K M_K`; see `optimizers/singd.py`
for the equations and the reference. All functions take stacks along one leading axis. A multiple of the identity, `K =
C = k I`, is a fixed point for multiples of the identity `A = a I`, `G = g I` if

    k^4 (a g + damping) = 1           with the traces
    k^2 (a + damping) = 1             without, and likewise for C
"""

import dataclasses

import tensorflow as tf

from keras_curvature import trees


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
        return self._step(K, M_K, lead), self._step(C, M_C, lead), M_K, M_C

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

    def _step(self, K, M, lead):
        # shorter than `rate` in the spectral norm: `I - rate M / |M|` stays invertible
        size = tf.sqrt(tf.reduce_sum(tf.square(M), list(range(lead, M.shape.rank)), keepdims=True))
        change = M * (self.rate / tf.maximum(size, 1.0))
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
