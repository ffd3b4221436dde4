"""The Neumann series, as Richardson iteration."""

import dataclasses

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.solvers.base import Solution, Solver


@register
@dataclasses.dataclass(frozen=True)
class NeumannSeries(Solver):
    """Truncated Neumann series of the inverse.

        x = rate * sum_{i=0..K} (I - rate A)^i b,      that is   x_0 = rate b,   x_k = x_{k-1} + rate (b - A x_{k-1})

    converges to `A^-1 b` where `rate * lambda_max < 2`, by the factor `1 - rate * lambda_min` per step; a negative
    eigenvalue makes it grow. With a `start` the same iteration begins there.

    Reference: Krishnan, Xiao and Saurous (2018), equations 4-6.

    Args:
        steps: `K`, the number of products. Defaults to `10`.
        rate: The scale of the iteration, positive. Defaults to `0.1`.

    Example: `TwoLoopNeumann(solver=NeumannSeries(steps=20, rate=0.05))`
    """

    steps: int = 10
    rate: float = 0.1

    def __post_init__(self):
        check_count(self, "steps", self.steps)
        check_number(self, "rate", self.rate, low=0, open_low=True)

    def solve(self, operator, rhs, start=None, preconditioner=None):
        """`K` steps. A preconditioner `P` replaces `rate * I` by `rate * P`."""

        def scaled(vector):
            return trees.scale(self.rate, vector if preconditioner is None else preconditioner @ vector)

        def step(k, x):
            residual = trees.subtract(rhs, operator @ x)
            return k + 1, trees.add(x, scaled(residual))

        begin = scaled(rhs) if start is None else list(start)
        _, x = tf.while_loop(lambda k, x: k < self.steps, step, (tf.constant(0), begin))
        # the residual of the last iterate would cost one more product
        return Solution(x, tf.constant(self.steps), tf.constant(float("nan"), trees.scalar_dtype(rhs)))
