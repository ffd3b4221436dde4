"""LiSSA: Newton steps by the Neumann series with a new part of the batch in each term."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_count, check_number, check_part, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.typing import LearningRate, Vector


@register
class LiSSA(CurvatureOptimizer):
    """LiSSA: an unbiased estimate of the truncated Neumann series for the Newton step.

    For convex problems and large batches: on a network, directions of negative curvature grow, and with a small batch
    the loss may rise without bound.

        d_0 = 0,     d_j = d_{j-1} + rate (g - (H_j + damping I) d_{j-1}),     j = 1 .. steps
        w <- w - learning_rate * d_steps

    with the gradient `g` of the whole batch and the Hessian `H_j` of a part of it, another one in each term. In the
    mean over the parts `d = (1 - (1 - rate H)^steps) H^-1 g`: the error along an eigenvalue `l` is
    `(1 - rate l)^steps`. Needs `rate < 2 / l` for the largest one. Costs `steps` products with a part of the
    batch, and no state.

    Reference: Agarwal, Bullins and Hazan, "Second-order stochastic optimization for machine learning in linear time"
    (2017), Algorithm 1, and the authors' code. Differences from the paper: (1) `rate`, where the paper scales the loss
    so that its Hessian is below 1; (2) begins at 0 with one chain, as the code does, where the paper begins at `g` and
    averages chains; (3) `damping`, which the paper does not have.

    Args:
        learning_rate: Multiple of the step. Defaults to `1.0`.
        steps: Number of terms. Defaults to `10`.
        rate: Step of the series; `None`: 1 over the largest eigenvalue of `H_1 + damping I`, from `power_steps`
            products with it. Defaults to `None`.
        curvature_batch: Part of the batch for each product: a share in (0, 1], or a number of examples. Defaults to
            `0.25`.
        damping: Added to the Hessian, at least 0. Defaults to `1e-3`.
        power_steps: Products for the largest eigenvalue, where `rate` is `None`. Defaults to `10`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `rate`, `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.LiSSA(steps=50), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=50)
    ```
    """

    needs = Needs(hessian=True)
    reports = {"rate": "mean", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 1.0, steps: int = 10, rate: float | None = None,
        curvature_batch: float = 0.25, damping: float = 1e-3, power_steps: int = 10, name: str = "lissa", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.steps, self.rate, self.curvature_batch = steps, rate, curvature_batch
        self.damping, self.power_steps = damping, power_steps
        check_count(self, "steps", steps)
        check_number(self, "rate", rate, low=0, open_low=True, or_none=True)
        check(self, "curvature_batch", curvature_batch, curvature_batch is not None, "a share in (0, 1], or an integer")
        check_part(self, "curvature_batch", curvature_batch)
        check_number(self, "damping", damping, low=0)
        check_count(self, "power_steps", power_steps)

    def direction(self, lin: Linearization) -> Vector:
        """`-d`."""
        g, first = lin.gradient, tf.cast(self.iterations, tf.int32) * self.steps

        def product(index, v):
            there = lin.chunk(self.curvature_batch, index).hessian() @ v
            return trees.add(there, v, float(self.damping))

        rate = self._rate(lambda v: product(first, v), g)

        def term(j, d):
            return j + 1, trees.add(d, trees.subtract(g, product(first + j, d)), rate)

        _, d = tf.while_loop(
            lambda j, d: j < self.steps, term, (tf.constant(0), trees.zeros_like(g)), parallel_iterations=1
        )
        self.report(rate=rate)
        return trees.negative(d)

    def _rate(self, product, g):
        """The step of the series; by the power method from the gradient."""
        dtype = trees.scalar_dtype(g)
        if self.rate is not None:
            return tf.constant(self.rate, dtype)

        def power(i, v, length):
            v = product(trees.scale(1.0 / tf.where(length > 0, length, tf.ones_like(length)), v))
            return i + 1, v, trees.norm(v)

        _, _, largest = tf.while_loop(
            lambda i, v, length: i < self.power_steps, power, (tf.constant(0), list(g), trees.norm(g)),
            parallel_iterations=1,
        )  # fmt: skip
        # the power method ends below the largest eigenvalue
        return tf.where(largest > 0, 1.0 / (1.1 * tf.where(largest > 0, largest, tf.ones_like(largest))), 1.0)

    def linear_step(self) -> NotLinear:
        """None: the step is a polynomial in the curvature."""
        return NotLinear(
            "`LiSSA` sums a series of products, which converges while the largest curvature is below 2 / rate. Watch "
            "its `rate`."
        )
