"""The criterion of PSGD, which fits a preconditioner to pairs of vectors; shared code of its geometries.

    minimize over P > 0 in a family      c(P) = E[h'P h + v'P^-1 v],      v ~ N(0, I)

For `h = H v` (Newton type) the minimum over all matrices is `P = (H H)^-1/2 = |H|^-1`; for `h = g`, independent of `v`
(whitening type), it is `P = (E g g')^-1/2`. With `P = Q'Q` and `Q` in a matrix group, relative steps
`Q <- Q - mu/L (...) Q` descend `c`. `Q` stays invertible, and no matrix of its size is inverted. The step size is
`mu / L`, with `L` a running bound on the norm of the bracket:

    l = |P h h'P| + |v v'|      L <- max(beta L + (1 - beta) l, l)

A geometry is a frozen record: a family of matrices and the options of its fit. It is pure: it takes the state, a list
of tensors, and returns the next state. It is among the solvers because it computes an inverse root of a matrix from
products with the matrix.

Reference: Li, "Preconditioned stochastic gradient descent" (arXiv:1512.04202), and the author's psgd_torch.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import Component, check_number
from keras_curvature.operators import LinearOperator
from keras_curvature.typing import Integer, Shape, Vector

# name, shape and initializer of a tensor of the state
Spec: TypeAlias = tuple[str, Shape, str | Callable[..., tf.Tensor]]


class Draws:
    """Random numbers of one update. They are the same on all replicas, and eagerly, in a graph and compiled.

    They are computed from random bits here, because XLA makes other floating-point numbers from the same bits.

    Args:
        seed: An integer or integer tensor. The numbers depend on it and on the number of earlier draws.
    """

    def __init__(self, seed: Integer) -> None:
        self._seed, self._drawn = tf.cast(seed, tf.int32), 0

    def normal(self, shape: Shape, dtype: tf.DType) -> tf.Tensor:
        """Standard normal numbers, by the inverse of their distribution function."""
        return 2.0**0.5 * tf.math.erfinv(self._symmetric(shape, dtype))

    def normal_like(self, vector: Vector) -> Vector:
        """A vector of standard normal numbers."""
        return [self.normal(a.shape, a.dtype) for a in vector]

    def uniform(self, dtype: tf.DType, shape: Shape = ()) -> tf.Tensor:
        """Numbers in (0, 1)."""
        return 0.5 + 0.5 * self._symmetric(shape, dtype)

    def _symmetric(self, shape, dtype):
        """Uniform numbers in (-1, 1): odd multiples of 2^-23, which are exact in float32 and never -1 or 1."""
        self._drawn += 1
        bits = tf.random.stateless_uniform(shape, tf.stack([self._seed, self._drawn]), None, None, tf.int32)
        return (tf.cast(tf.bitwise.right_shift(bits, 9), dtype) + 0.5) * 2.0**-22


@dataclasses.dataclass(frozen=True)
class Geometry(Component):
    """Base of the geometries, with their common options.

    A subclass implements `specs`, `fitted`, `operator` and `groups`.

    Args:
        rate: `mu`, the step size of the fit, in (0, 1). Defaults to `0.1` (the reference).
        beta: Decay of the running bound `L`, in [0, 1); sparse gradients need a larger one. Defaults to `0.9` (the
            reference).
        damping: Size of the noise added to `h`, which bounds `P` by `1 / damping`. Defaults to `1e-9` (the reference).
        initial: Scale of `Q` at the start; `None`: computed from the first pair, `(E v^2)^1/4 (E h^4)^-1/8`. Defaults
            to `None`.
    """

    rate: float = 0.1
    beta: float = 0.9
    damping: float = 1e-9
    initial: float | None = None

    def __post_init__(self):
        check_number(self, "rate", self.rate, low=0, high=1, open_low=True, open_high=True)
        check_number(self, "beta", self.beta, low=0, high=1, open_high=True)
        check_number(self, "damping", self.damping, low=0)
        check_number(self, "initial", self.initial, low=0, open_low=True, or_none=True)

    def specs(self, shapes: list[Shape]) -> list[Spec]:
        """A list of `(name, shape, initializer)`, one for each tensor of the state, for weights of the given shapes."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `specs(shapes)`.")

    def fit(self, state: Vector, v: Vector | None, h: Vector, draws: Draws) -> Vector:
        """The state after the pair `(v, h)`; NaN if the fit fails. A pair with `h = 0` leaves the state unchanged.

        Args:
            state: A list of tensors, as in `specs`.
            v: The probe, a vector of standard normal numbers; `None` for the whitening type.
            h: `H v`, or the gradient, a vector.
            draws: The random numbers of this update, a `Draws`.

        Returns:
            The next state, a list of tensors.
        """
        nothing = tf.reduce_all([tf.reduce_all(tf.equal(a, 0)) for a in h])
        return tf.cond(nothing, lambda: [tf.identity(a) for a in state], lambda: self.fitted(state, v, h, draws))

    def fitted(self, state: Vector, v: Vector | None, h: Vector, draws: Draws) -> Vector:
        """`fit` for an `h` that is not zero."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `fitted(state, v, h, draws)`.")

    def operator(self, state: Vector, shapes: list[Shape]) -> LinearOperator:
        """`P`, a `LinearOperator` on weights of the given shapes."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `operator(state, shapes)`.")

    def groups(self, vector: Vector) -> list[Vector]:
        """The parts of a vector that share a preconditioner, a list of vectors."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `groups(vector)`.")

    # For subclasses.

    def _noisy(self, h, noise):
        """`h` plus noise of the size of `damping` plus the rounding error of `h`."""
        return [a + (self.damping + np.finfo(a.dtype.as_numpy_dtype).eps * tf.abs(a)) * b for a, b in zip(h, noise)]

    def _scale(self, begins, v, h):
        """The scale of `Q` from the first pair, a scalar; 1 after the first pair."""
        dtype = h[0].dtype
        if self.initial is not None:
            return tf.constant(self.initial, dtype)

        def scale():
            largest = tf.reduce_max([tf.reduce_max(tf.abs(a)) for a in h])
            # divided by the largest entry, because fourth powers leave the range of float32
            largest = tf.maximum(largest, max(self.damping, np.finfo(dtype.as_numpy_dtype).tiny))
            fourth = self._fourth_moment([a / largest for a in h]) + (self.damping / largest) ** 4
            scale = fourth ** (-1 / 8) / tf.sqrt(largest)
            scale = tf.where(tf.math.is_finite(largest), scale, tf.constant(float("nan"), dtype))  # 0 would stay 0
            return scale if v is None else scale * (tf.cast(trees.squared_norm(v), dtype) / trees.count(v)) ** (1 / 4)

        return tf.cond(begins, scale, lambda: tf.ones((), dtype))

    def _fourth_moment(self, h):
        raise NotImplementedError(f"`{type(self).__name__}` must implement `_fourth_moment(h)`.")

    def _bound(self, L, change):
        """The next bound `L`."""
        return tf.maximum(self.beta * L + (1 - self.beta) * change, change)


def all_or_none(tensors):
    """The tensors, or all NaN if one is not finite, so that a state is replaced as a whole or not at all."""
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(a)) for a in tensors])
    return [tf.where(finite, a, tf.constant(float("nan"), a.dtype)) for a in tensors]
