"""SASSHA: Hutchinson's diagonal at a point uphill, for flatter minima."""

from typing import Any, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Diagonal
from keras_curvature.optimizers.by_weight import LimitedDiagonalOptimizer
from keras_curvature.optimizers.limits import LinearStep, NotLinear, averaged
from keras_curvature.typing import LearningRate, Vector


@register
class SASSHA(LimitedDiagonalOptimizer):
    """SASSHA: momentum over a power of the Hessian's absolute diagonal, both taken where the loss is worse.

        e = rho g / |g|                                               g: gradient at w
        m <- beta_1 m + (1 - beta_1) gradient at w + e
        D <- beta_2 D + (1 - beta_2) |z * (H z)|                      every so many steps, H at w + e, z of random signs
        d = m^ / (D^ ^ hessian_power + epsilon),    w <- w - learning_rate * clip(d, -step_max, step_max)

    with `m^, D^` corrected for their bias towards zero. As in sharpness-aware minimization, the gradient at the worse
    point `w + e` keeps training out of sharp minima. The absolute value makes the estimate usable where the curvature
    is negative, and the power limits the error of an estimate that is reused for several steps. Costs two gradients in
    each step and a Hessian product in every `every`-th.

    Reference: Shin, Lee, Lee and Lee, "SASSHA: Sharpness-aware adaptive second-order optimization with stable Hessian
    approximation" (2025), Algorithm 1, and github.com/LOG-postech/Sassha. Differences from that code: (1) the bias
    correction of `D` counts the estimates; there the steps; (2) an estimate that is not finite is left out; (3)
    `hessian_power` is constant; there it may follow a schedule; (4) weight decay is Keras': before the step; (5)
    `step_max`, which the authors do not have; `SASSHA.paper()` has no such limit.

    Args:
        learning_rate: Defaults to `0.15` (the authors).
        rho: Length of `e`; 0: `w` itself, for one gradient in each step. Defaults to `0.1` (the authors: 0.1 to 0.25).
        beta_1: Decay of the average of gradients. Defaults to `0.9` (the authors).
        beta_2: Decay of the average of estimates. Defaults to `0.999` (the authors).
        hessian_power: Exponent of the diagonal, in [0, 1]. Defaults to `0.5` (the authors).
        epsilon: Added to the denominator. Defaults to `1e-4` (the authors).
        every: A new estimate in every so many steps. Defaults to `10` (the authors). An estimate is zero for weights
            of inputs that are zero in its whole batch; on data with such inputs (pixels of digits), use `every=1` or a
            larger `epsilon`.
        step_max: Largest absolute entry of `d`, or `None` for no limit. Defaults to `0.02`, so that no weight moves
            by more than 0.003 in a step: without it a dense network diverged at the authors' rate.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes`, `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SASSHA(), loss="mse")
    ```
    """

    needs = Needs(hessian=True)
    reports = {"failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.15, rho: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.999,
        hessian_power: float = 0.5, epsilon: float = 1e-4, every: int = 10, step_max: float | None = 0.02,
        name: str = "sassha", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.rho, self.beta_1, self.beta_2 = rho, beta_1, beta_2
        self.hessian_power, self.epsilon, self.every = hessian_power, epsilon, every
        check_number(self, "rho", rho, 0.0)
        check_number(self, "beta_1", beta_1, 0.0, 1.0, open_high=True)
        check_number(self, "beta_2", beta_2, 0.0, 1.0, open_high=True)
        check_number(self, "hessian_power", hessian_power, 0.0, 1.0)
        check_number(self, "epsilon", epsilon, 0.0, open_low=True)
        check_count(self, "every", every)
        self.set_step_max(step_max)

    @classmethod
    def paper(cls, **kwargs: Any) -> Self:
        """The method of the paper, without a limit on the step: `step_max=None`.

        Args:
            **kwargs: Arguments of the constructor.

        Example: `SASSHA.paper(learning_rate=0.05)`
        """
        return cls(**{"step_max": None, **kwargs})

    def direction(self, lin: Linearization) -> Vector:
        """`-m^ / (D^ ^ power + epsilon)`."""
        uphill = self._uphill(lin)
        product = self.product(uphill, "rademacher")

        def diagonal():
            # the absolute value of the sum over the batch, all replicas' parts included
            return [tf.abs(z * Hz) for z, Hz in zip(*product())]

        m, D, counts = self.follow(lambda: uphill.gradient, diagonal)
        scales = self._scales(D, counts, self.iterations + 1)
        return self.limited([-a * scale for a, scale in zip(m, scales)])

    def _uphill(self, lin):
        if not self.rho:
            return lin
        g = lin.gradient
        length = trees.norm(g)
        scale = tf.math.divide_no_nan(trees.exactly(float(self.rho), length.dtype), length)
        return lin.again(shift=trees.scale(scale, g))

    def _scales(self, D, counts, steps):
        """The positive factor on each entry of `m`; zero while there is no estimate."""

        def scale(d, n):
            share = self.share(self.beta_2, n, d.dtype)
            root = tf.pow(tf.math.divide_no_nan(d, share), self.hessian_power)
            return tf.cast(n > 0, d.dtype) / (self.share(self.beta_1, steps, d.dtype) * (root + self.epsilon))

        return [scale(d, n) for d, n in zip(D, counts)]

    def linear_step(self) -> LinearStep | NotLinear:
        """Momentum as of Adam, the denominator of the last step; no known limit with the gradient of another point."""
        if self.rho:
            return NotLinear("`SASSHA` steps by the gradient of a point uphill: no limit on the curvature is known.")
        return LinearStep(averaged(self.beta_1), self._preconditioner, self.limit_note)

    def _preconditioner(self):
        return Diagonal(
            self._scales(trees.values(self._D), tf.unstack(tf.identity(self._counts.value)), self.iterations)
        )
