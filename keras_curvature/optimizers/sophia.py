"""Sophia: momentum divided by a rarely estimated diagonal of the curvature, and clipped."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.by_weight import DiagonalOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.typing import LearningRate, Vector


class Sophia(DiagonalOptimizer):
    """Base of `SophiaH` and `SophiaG`, which differ in the estimate `estimator(lin)`."""

    reports = {"unclipped": "mean", "failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate, beta_1: float, beta_2: float, gamma: float, epsilon: float, every: int,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, **kwargs)
        self.beta_1, self.beta_2, self.gamma, self.epsilon, self.every = beta_1, beta_2, gamma, epsilon, every
        check_number(self, "beta_1", beta_1, 0.0, 1.0, open_high=True)
        check_number(self, "beta_2", beta_2, 0.0, 1.0, open_high=True)
        check_number(self, "gamma", gamma, 0.0, open_low=True)
        check_number(self, "epsilon", epsilon, 0.0, open_low=True)
        check_count(self, "every", every)

    def estimator(self, lin: Linearization) -> Callable[[], Vector]:
        """A function that returns an estimate of the diagonal of the curvature, a vector."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `estimator(lin)`.")

    def direction(self, lin: Linearization) -> Vector:
        """`-clip(m / max(gamma h, epsilon), 1)`."""
        m, h, _ = self.follow(lambda: lin.gradient, self.estimator(lin))
        steps = [a / tf.minimum(-self.gamma * b, -self.epsilon) for a, b in zip(m, h)]
        self.report(unclipped=self._when_due(lambda: _unclipped(steps)))
        return [tf.clip_by_value(s, -1.0, 1.0) for s in steps]

    def linear_step(self) -> NotLinear:
        """None, because of the clipping."""
        return NotLinear(
            f"`{type(self).__name__}` clips each entry of its steps to the learning rate, so the length of a clipped "
            "entry does not depend on the gradient. Its report `unclipped` is the share of the other entries."
        )

    def _when_due(self, number):
        """`number()` in steps with a new estimate, else NaN: it costs passes over the weights."""
        return tf.cond(tf.equal(self.iterations % self.every, 0), number, lambda: tf.constant(float("nan")))


def _unclipped(steps):
    """The share of the entries between -1 and 1."""
    inside = tf.add_n([tf.math.count_nonzero(tf.abs(s) < 1.0, dtype=tf.int32) for s in steps])
    return tf.cast(inside, tf.float32) / trees.count(steps)


@register
class SophiaH(Sophia):
    """Sophia-H: momentum over Hutchinson's estimate of the diagonal of the Hessian, no entry longer than 1.

        h <- beta_2 h + (1 - beta_2) u * (H u)         every so many steps, u normally distributed
        m <- beta_1 m + (1 - beta_1) g
        w <- w - learning_rate * clip(m / max(gamma h, epsilon), 1)

    If the curvature is small or negative, the step is the sign of the momentum. Costs one Hessian product every `every`
    steps, and two copies of the weights.

    Reference: Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training" (2023), Algorithms 1 and 3. Differences: (1) the paper's weight decay (0.1) is Keras' own, which is
    off by default; (2) an estimate that is not finite is left out.

    Args:
        learning_rate: The length of a clipped entry. Defaults to `2e-3` (the paper's language models: up to 6e-4). With
            1e-3 it reached 0.8 of Adam's reduction of the loss in 150 steps on a small LSTM, with 2e-3 1.3 (`tuning`
            data of `examples/benchmarks/defaults.py`).
        beta_1: Decay of the average of gradients. Defaults to `0.96` (the paper).
        beta_2: Decay of the average of estimates. Defaults to `0.99` (the paper).
        gamma: Factor of the curvature, such that 10% to 50% of the entries are unclipped. Defaults to `0.01` (the
            paper).
        epsilon: Least denominator. Defaults to `1e-12` (the paper).
        every: A new estimate in every so many steps. Defaults to `10` (the paper).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `unclipped` (share of the entries, in steps with a new estimate), `failed_refreshes`, `step_norm`,
        `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SophiaH(weight_decay=0.1), loss="mse")
    ```
    """

    needs = Needs(hessian=True)

    def __init__(
        self, learning_rate: LearningRate = 2e-3, beta_1: float = 0.96, beta_2: float = 0.99, gamma: float = 0.01,
        epsilon: float = 1e-12, every: int = 10, name: str = "sophia_h", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, beta_1, beta_2, gamma, epsilon, every, name=name, **kwargs)

    def estimator(self, lin: Linearization) -> Callable[[], Vector]:
        """`u * (H u)`."""
        product = self.product(lin, "gaussian")
        return lambda: [u * Hu for u, Hu in zip(*product())]


@register
class SophiaG(Sophia):
    """Sophia-G: momentum over the Gauss-Newton-Bartlett estimate of the diagonal, no entry longer than 1.

        h <- beta_2 h + (1 - beta_2) N g^ * g^         every so many steps
        m <- beta_1 m + (1 - beta_1) g
        w <- w - learning_rate * clip(m / max(gamma h, epsilon), 1)

    with `g^` the gradient of the loss with labels drawn from the model, instead of the true ones. Costs one backward
    pass every `every` steps, and two copies of the weights.

    Reference: Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training" (2023), Algorithms 2 and 3. Differences: (1) instead of the factor N, the number of labels, `g^`
    contains the square root of each label's weight in the loss: the same for a plain mean, and still unbiased with
    sample weights, masks and loss weights; (2) every likelihood of Keras' losses works, not only the categorical one;
    (3) a step uses the estimate made before it, as in the paper; the authors' code uses it in the next step; (4) the
    least denominator is `epsilon`, as in the paper; the authors' code adds it; (5) the paper's weight decay (0.1) is
    Keras' own, which is off by default; (6) an estimate that is not finite is left out.

    Args:
        learning_rate: The length of a clipped entry. Defaults to `2e-3` (the paper's language models: up to 6e-4). With
            1e-3 it reached 0.8 of Adam's reduction of the loss in 150 steps on a small LSTM, with 2e-3 1.3 (`tuning`
            data of `examples/benchmarks/defaults.py`).
        beta_1: Decay of the average of gradients. Defaults to `0.965` (the authors' code; the paper: 0.96).
        beta_2: Decay of the average of estimates. Defaults to `0.99` (the paper).
        gamma: Factor of the curvature, such that 10% to 50% of the entries are unclipped. Defaults to `0.05` (the
            paper; `rho` in the authors' code).
        epsilon: Least denominator. Defaults to `1e-12` (the paper).
        every: A new estimate in every so many steps. Defaults to `10` (the paper).
        **kwargs: See `CurvatureOptimizer`.

    Raises:
        ValueError: At the first step, if the loss is not the negative logarithm of a known likelihood.

    Reports: `unclipped` (share of the entries, in steps with a new estimate), `failed_refreshes`, `step_norm`,
        `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SophiaG(weight_decay=0.1), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs()

    def __init__(
        self, learning_rate: LearningRate = 2e-3, beta_1: float = 0.965, beta_2: float = 0.99, gamma: float = 0.05,
        epsilon: float = 1e-12, every: int = 10, name: str = "sophia_g", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, beta_1, beta_2, gamma, epsilon, every, name=name, **kwargs)

    def estimator(self, lin: Linearization) -> Callable[[], Vector]:
        """`N g^ * g^`."""
        return lambda: lin.fisher_diagonal(self.seed)
