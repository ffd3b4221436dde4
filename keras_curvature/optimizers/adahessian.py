"""AdaHessian: Adam with the diagonal of the Hessian in the second moment."""

from typing import Any, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_flag, check_number, register
from keras_curvature.linearization.estimates import diagonals
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Diagonal
from keras_curvature.optimizers.by_weight import LimitedDiagonalOptimizer
from keras_curvature.optimizers.limits import LinearStep, averaged
from keras_curvature.typing import LearningRate, Shape, Variables, Vector


@register
class AdaHessian(LimitedDiagonalOptimizer):
    """AdaHessian: momentum over the root mean square of Hutchinson's estimates of the diagonal of the Hessian.

        h = mean over each kernel of z * (H z)         z of random signs, the same on all replicas
        m <- beta_1 m + (1 - beta_1) g
        s <- beta_2 s + (1 - beta_2) h^2
        d = m^ / (sqrt(s^)^hessian_power + epsilon),    w <- w - learning_rate * clip(d, -step_max, step_max)

    with `m^, s^` corrected for their bias towards zero. Costs one Hessian product, which shares the forward and
    backward pass of the gradient, and two copies of the weights (less, of convolution kernels).

    Reference: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, "ADAHESSIAN: An Adaptive Second Order Optimizer for
    Machine Learning" (2020), Algorithm 1. Differences: (1) a kernel's average is of `z * (H z)`, as in the paper; the
    authors' code averages the absolute values. (2) Kernels with four axes or more are averaged; neither averages
    one-dimensional convolutions. (3) With `every > 1`, `s` changes only with a new estimate, and its bias correction
    counts the estimates. (4) An estimate that is not finite is left out. (5) `step_max`, which the paper does not have;
    `AdaHessian.paper()` has no such limit.

    Args:
        learning_rate: Defaults to `0.15` (the paper).
        beta_1: Decay of the average of gradients. Defaults to `0.9` (the paper).
        beta_2: Decay of the average of squares. Defaults to `0.999` (the paper).
        epsilon: Added to the denominator. Defaults to `1e-4` (the authors' code).
        hessian_power: Exponent of the root in the denominator, in [0, 1]; 0 is gradient descent with momentum. Defaults
            to `1.0` (the paper).
        spatial_averaging: Whether the entries of a convolution kernel share their curvature. Defaults to `True`.
        every: A new estimate in every so many steps. Defaults to `1`.
        step_max: Largest absolute entry of `d`, or `None` for no limit. Defaults to `0.02`, so that no weight moves
            by more than 0.003 in a step. Without limit the loss rose up to sixteenfold in the first ten steps on small
            dense, convolutional and regression networks; with it, it fell (`examples/benchmarks/defaults.py`).
        **kwargs: See `CurvatureOptimizer`; `weight_decay` is decoupled, as in the paper.

    Reports: `curvature_norm` (of `sqrt(s^)`), `failed_refreshes`, `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.AdaHessian(), loss="mse")
    ```
    """

    needs = Needs(hessian=True)
    reports = {"curvature_norm": "mean", "failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.15, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-4,
        hessian_power: float = 1.0, spatial_averaging: bool = True, every: int = 1,
        step_max: float | None = 0.02, name: str = "adahessian", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.beta_1, self.beta_2, self.epsilon, self.hessian_power = beta_1, beta_2, epsilon, hessian_power
        self.spatial_averaging, self.every = spatial_averaging, every
        check_number(self, "beta_1", beta_1, 0.0, 1.0, open_high=True)
        check_number(self, "beta_2", beta_2, 0.0, 1.0, open_high=True)
        check_number(self, "epsilon", epsilon, 0.0)
        check_number(self, "hessian_power", hessian_power, 0.0, 1.0)
        check_flag(self, "spatial_averaging", spatial_averaging)
        check_count(self, "every", every)
        self.set_step_max(step_max)

    @classmethod
    def paper(cls, **kwargs: Any) -> Self:
        """The method of the paper, without a limit on the step: `step_max=None`.

        Args:
            **kwargs: Arguments of the constructor.

        Example: `AdaHessian.paper(learning_rate=0.05)`. The paper warms the learning rate up over 500 steps.
        """
        return cls(**{"step_max": None, **kwargs})

    def shapes(self, variables: Variables) -> list[Shape]:
        """One entry for each kernel instead of each weight."""
        return [s.shape for s in self._shared(trees.values(variables))]

    def direction(self, lin: Linearization) -> Vector:
        """`-m^ / (sqrt(s^)^k + epsilon)`."""

        product = self.product(lin, "rademacher")

        def squares():
            # the square alone would lose the sign
            estimate = [z * Hz if z.shape.rank >= 4 else Hz for z, Hz in zip(*product())]
            return [tf.square(h) for h in self._shared(estimate)]

        m, s, counts = self.follow(lambda: lin.gradient, squares)
        taken = self.share(self.beta_1, self.iterations + 1, m[0].dtype)
        shares = [self.share(self.beta_2, n, s.dtype) for n, s in zip(counts, s)]
        self.report(curvature_norm=tf.sqrt(tf.add_n([
            tf.math.divide_no_nan(tf.cast(tf.reduce_sum(s), tf.float32), tf.cast(share, tf.float32))
            for s, share in zip(s, shares)
        ])))  # fmt: skip
        return self.limited([self._divide(*each, tf.cast(taken, each[0].dtype)) for each in zip(m, s, shares)])

    def _divide(self, m, s, share, taken):
        # the bias of `s` as a factor of the rest: saves a pass over the weights, and no step before the first estimate
        root = tf.sqrt(s) if self.hessian_power == 1.0 else tf.pow(s, 0.5 * self.hessian_power)
        bias = tf.pow(share, 0.5 * self.hessian_power)
        return tf.math.divide_no_nan(m * (-bias / taken), root + bias * self.epsilon)

    def linear_step(self) -> LinearStep:
        """Momentum as of Adam; the denominator of the last step."""
        return LinearStep(averaged(self.beta_1), self._preconditioner, self.limit_note)

    def _preconditioner(self):
        s, counts = trees.values(self._D), tf.unstack(tf.identity(self._counts.value))
        ones = [tf.ones(v.shape, s_.dtype) for v, s_ in zip(self.trained, s)]
        taken = self.share(self.beta_1, self.iterations, tf.float64)
        return Diagonal([
            -self._divide(one, s_, self.share(self.beta_2, n, s_.dtype), tf.cast(taken, s_.dtype))
            for one, s_, n in zip(ones, s, counts)
        ])  # fmt: skip

    def _shared(self, vector):
        return diagonals.average_kernels(vector) if self.spatial_averaging else vector
