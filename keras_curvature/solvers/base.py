"""Solvers of `A x = b`. They work on operators, never on a loss, a batch or a variable.

A solver is a frozen record of its choices and pure: `solve(operator, rhs, start, preconditioner)` returns a
`Solution`. Vectors are lists of tensors. `preconditioner` is an operator close to the inverse of `A`.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_curvature.component import Component


@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of a solver.

    Attributes:
        value: The approximate solution `x`, a vector.
        steps: Number of iterations, a scalar integer tensor.
        residual: `|b - A x| / |b|`, a scalar; NaN if the solver does not compute it.
        finite: Whether all products on the way were finite, a scalar boolean tensor. An iteration that ends at a
            product that overflowed leaves an older, finite iterate in `value`. Defaults to `True`.
        count: Number of stored iterates, a scalar integer tensor.
        iterate: Function from an index in `[0, count)` to that stored iterate, oldest first.
    """

    value: list
    steps: tf.Tensor
    residual: tf.Tensor
    finite: tf.Tensor = True
    count: tf.Tensor = 0
    iterate: Callable | None = None


class Solver(Component):
    """Base of the solvers. A subclass is a frozen dataclass with `solve`."""

    def solve(self, operator, rhs, start=None, preconditioner=None):
        """The `Solution` of `operator @ x = rhs`, beginning at `start` (default: zero)."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `solve`.")


def require_psd(operator, asked_by, remedy):
    """Refuse an operator that is not positive semi-definite, with a remedy."""
    if not operator.psd:
        raise ValueError(f"`{asked_by}` needs a positive semi-definite operator. {remedy}")
