"""The Neumann series, as Richardson iteration."""

import dataclasses

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers.base import Solution, Solver
from keras_curvature.typing import Vector


@register
@dataclasses.dataclass(frozen=True)
class NeumannSeries(Solver):
    """Truncated Neumann series of the inverse.

        x = rate * sum_{i=0..K} (I - rate A)^i b,      that is   x_0 = rate b,   x_k = x_{k-1} + rate (b - A x_{k-1})

    This converges to `A^-1 b` if all eigenvalues of `A` are in `(0, 2 / rate)`; each step multiplies the error along an
    eigenvector by `1 - rate * lambda`. A negative eigenvalue makes it diverge. With `start`, `x_0` is `start`.

    Reference: Krishnan, Xiao and Saurous, "Neumann optimizer: A practical optimization algorithm for deep neural
    networks" (2018), equations 4-6.

    Args:
        steps: `K`, the number of products. Defaults to `10`.
        rate: Step size of the iteration, positive. Defaults to `0.1`.

    Example: `TwoLoopNeumann(solver=NeumannSeries(steps=20, rate=0.05))`
    """

    steps: int = 10
    rate: float = 0.1

    def __post_init__(self):
        check_count(self, "steps", self.steps)
        check_number(self, "rate", self.rate, low=0, open_low=True)

    def solve(
        self, operator: LinearOperator, rhs: Vector, start: Vector | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:  # fmt: skip
        """Take `K` steps and return the `Solution`. A preconditioner `P` replaces `rate * I` by `rate * P`."""

        def scaled(vector):
            return trees.scale(self.rate, vector if preconditioner is None else preconditioner @ vector)

        def step(k, x):
            residual = trees.subtract(rhs, operator @ x)
            return k + 1, trees.add(x, scaled(residual))

        begin = scaled(rhs) if start is None else list(start)
        _, x = tf.while_loop(lambda k, x: k < self.steps, step, (tf.constant(0), begin))
        # the residual of the last iterate would cost one more product
        return Solution(x, tf.constant(self.steps), tf.constant(float("nan"), trees.scalar_dtype(rhs)))
