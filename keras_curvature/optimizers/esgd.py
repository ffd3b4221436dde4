"""Equilibrated stochastic gradient descent."""

from typing import Any, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Diagonal
from keras_curvature.optimizers.by_weight import LimitedDiagonalOptimizer
from keras_curvature.optimizers.limits import LinearStep, Rule
from keras_curvature.typing import LearningRate, Vector


@register
class ESGD(LimitedDiagonalOptimizer):
    """ESGD: each entry of the gradient is divided by the norm of its row of the Hessian.

        D <- mean of (H v)^2 over all draws so far     every so many steps, v normally distributed
        d = g / (sqrt(D) + epsilon),    w <- w - learning_rate * clip(d, -step_max, step_max)

    `E (H v)_i^2 = |H_i|^2`: unlike the diagonal of the Hessian, the norm of its rows is no smaller where the curvature
    is negative. Costs one Hessian product in every `every`-th step, and one copy of the weights.

    Reference: Dauphin, de Vries and Bengio, "Equilibrated adaptive learning rates for non-convex optimization" (2015),
    Algorithm 1. Differences: (1) a draw that is not finite is left out; (2) `step_max`, which the paper does not have;
    `ESGD.paper()` has no such limit.

    Args:
        learning_rate: Defaults to `0.1`. On a small transformer it reached 0.4 to 0.5 of Adam's reduction of the loss
            in 150 steps with 0.01 (the authors' demonstration), and 1.0 with 0.1 and `step_max` (`tuning` data of
            `examples/benchmarks/defaults.py`).
        epsilon: Damping of the denominator. Defaults to `1e-3`.
        every: A new draw in every so many steps. Defaults to `20` (the paper).
        step_max: Largest absolute entry of `d`, or `None` for no limit. Defaults to `0.1`, so that no weight moves by
            more than 0.01 in a step. Where the first draw is small by chance, steps without limit diverge: a network
            64-512-512-10 did at a learning rate of 0.01 (`examples/benchmarks/defaults.py`).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes`, `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.ESGD(), loss="mse")
    ```
    """

    needs = Needs(hessian=True)
    reports = {"failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}
    beta_1, beta_2 = 0.0, None

    def __init__(
        self, learning_rate: LearningRate = 0.1, epsilon: float = 1e-3, every: int = 20,
        step_max: float | None = 0.1, name: str = "esgd", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.epsilon, self.every = epsilon, every
        check_number(self, "epsilon", epsilon, 0.0, open_low=True)
        check_count(self, "every", every)
        self.set_step_max(step_max)

    @classmethod
    def paper(cls, learning_rate: LearningRate = 0.01, **kwargs: Any) -> Self:
        """The method of the paper, without a limit on the step: `step_max=None`.

        Args:
            learning_rate: Defaults to `0.01` (the authors' demonstration).
            **kwargs: Arguments of the constructor.

        Example: `ESGD.paper()`
        """
        return cls(learning_rate, **{"step_max": None, **kwargs})

    def direction(self, lin: Linearization) -> Vector:
        """`-g / (sqrt(D) + epsilon)`."""

        product = self.product(lin, "gaussian")

        def squares():
            return [tf.square(h) for h in product()[1]]

        gradient, D, counts = self.follow(lambda: lin.gradient, squares)
        return self.limited([-g * scale for g, scale in zip(gradient, self._scales(D, counts))])

    def _scales(self, D, counts):
        # no step while there is no draw
        return [tf.cast(n > 0, d.dtype) / (tf.sqrt(d) + self.epsilon) for d, n in zip(D, counts)]

    def linear_step(self) -> LinearStep:
        """No momentum; the denominator of the last step."""
        return LinearStep(Rule(), self._preconditioner, self.limit_note)

    def _preconditioner(self):
        return Diagonal(self._scales(trees.values(self._D), tf.unstack(tf.identity(self._counts.value))))
