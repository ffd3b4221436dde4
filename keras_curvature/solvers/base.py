"""The interface of solvers of `A x = b`. They know operators and vectors, but no loss, batch or variable.

A solver is a frozen record of its options. `solve(operator, rhs, start, preconditioner)` is pure and returns a
`Solution`. Vectors are lists of tensors. `preconditioner` is an operator that approximates the inverse of `A`.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_curvature.component import Component
from keras_curvature.operators import LinearOperator
from keras_curvature.typing import Integer, Vector


@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of a solver.

    Attributes:
        value: The approximate solution `x`, a vector.
        steps: The number of iterations, a scalar integer tensor.
        residual: `|b - A x| / |b|`, a scalar; NaN if the solver does not compute it.
        finite: Whether all products were finite, a scalar boolean tensor. If one was not, `value` is the last iterate
            before it. Defaults to `True`.
        count: The number of stored iterates, a scalar integer tensor. Defaults to `0`.
        iterate: A function from an index in `[0, count)` to a stored iterate, oldest first; `None` if the solver stores
            none. Defaults to `None`.
        quadratic: A function from an index in `[0, count)` to `1/2 x'A x - b'x` of that iterate, a scalar; no product.
            Defaults to `None`.
    """

    value: Vector
    steps: tf.Tensor
    residual: tf.Tensor
    finite: tf.Tensor = True
    count: tf.Tensor = 0
    iterate: Callable[[Integer], Vector] | None = None
    quadratic: Callable[[Integer], tf.Tensor] | None = None


class Solver(Component):
    """Base of the solvers. A subclass is a frozen dataclass with `solve`."""

    def solve(
        self, operator: LinearOperator, rhs: Vector, start: Vector | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:  # fmt: skip
        """Solve `operator @ x = rhs`.

        Args:
            operator: `A`, a `LinearOperator`.
            rhs: `b`, a vector.
            start: The first iterate, a vector. Defaults to zero.
            preconditioner: A `LinearOperator` close to the inverse of `A`. Optional.

        Returns:
            A `Solution`.
        """
        signature = "solve(operator, rhs, start, preconditioner)"
        raise NotImplementedError(f"`{type(self).__name__}` must implement `{signature}`.")


def require_psd(operator, asked_by, remedy):
    """Raise a `ValueError` with a remedy if an operator is not positive semi-definite."""
    if not operator.psd:
        received = f"Received: a `{type(operator).__name__}` with psd=False"
        raise ValueError(f"`{asked_by}` needs a positive semi-definite operator. {received}. {remedy}")
