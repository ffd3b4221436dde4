"""Newton's method with a dense Hessian, for small models."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_count, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import dense
from keras_curvature.steps import Damping, LevenbergMarquardt, Trial, TrustRegion, as_damping
from keras_curvature.steps.trial import Attempt, first_taken
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class Newton(CurvatureOptimizer):
    """Newton's method with the dense Hessian of a small model, made safe at saddles.

    For full batches: with a small one a step goes to the minimum of that batch, and the loss of all data may rise
    without bound.

        H = V diag(l) V'                                 as many products as weights, and an eigendecomposition
        p = -V (|l| + lambda)^-1 V'g                     eigenvalues="absolute" (saddle-free)
        p = -V (l + lambda)^-1 V'g                       eigenvalues="signed": may climb to a saddle or a maximum
        p = argmin g'p + 1/2 p'H p  over  |p| <= radius  with a trust region: the global minimum
        w <- w + learning_rate * p                       if the loss falls, else the weights stay

    The damping `lambda`, or the radius, adapts by `(f(w + p) - f(w)) / (g'p + 1/2 p'Hp)`. Near a minimum the error
    squares in each step. For up to some thousand weights: a step costs `n` products and `n^3` operations in float64. If
    the loss rises, the same eigenvalues serve the next damping or radius, up to `attempts` times; then the weights stay
    bit-identical.

    Reference: Nocedal and Wright, "Numerical Optimization" (2006), chapters 3 and 4; absolute eigenvalues: Dauphin et
    al., "Identifying and attacking the saddle point problem" (2014); trust region: Moré and Sorensen (1983).
    Differences: (1) each batch of `fit` gives one step; (2) Dauphin et al. approximate the absolute value in a Krylov
    space, as `SaddleFreeNewton` does; here it is exact.

    Args:
        learning_rate: Multiple of the accepted step. Defaults to `1.0`.
        damping: A number, or a component. Defaults to `LevenbergMarquardt.martens(initial=1e-3)`.
        eigenvalues: `"absolute"` or `"signed"`. Defaults to `"absolute"`.
        trust_region: A `TrustRegion`, in place of `damping` and `eigenvalues`; `None`: none. Defaults to `None`.
        attempts: Most dampings or radii that a step tries; each costs the loss of the batch. Defaults to `10`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping` or `radius`, `reduction_ratio`, `lowest` (the smallest eigenvalue), `gradient_max` (largest
    entry, before the step), `step_norm`, `skipped_steps`.

    Raises:
        ValueError: When it is built: the matrices would need more than 8 GB.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.Newton(trust_region=keras_curvature.TrustRegion()), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=50)
    ```
    """

    needs = Needs(hessian=True)
    reports = {
        "damping": "last", "radius": "last", "reduction_ratio": "mean", "lowest": "last", "gradient_max": "last",
        "step_norm": "mean", "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, damping: float | Damping = LevenbergMarquardt.martens(initial=1e-3),
        eigenvalues: Literal["absolute", "signed"] = "absolute", trust_region: TrustRegion | None = None,
        attempts: int = 10, name: str = "newton", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.eigenvalues, self.trust_region = damping, eigenvalues, trust_region
        self.attempts = attempts
        check_count(self, "attempts", attempts)
        self._rule = as_damping(self, damping)
        check_choice(self, "eigenvalues", eigenvalues, ("absolute", "signed"))
        valid = trust_region is None or isinstance(trust_region, TrustRegion)
        check(self, "trust_region", trust_region, valid, "a `TrustRegion()`, or None")

    def create_state(self, variables: Variables) -> None:
        """The damping or the radius."""
        dense.check_size(self, variables, "Use `NewtonCG()` or `LBFGS()`.")
        rule = self._rule if self.trust_region is None else self.trust_region
        self._size = self.add_scalar(rule.initial, "radius" if self.trust_region else "damping")

    def direction(self, lin: Linearization) -> Vector:
        """The accepted step."""
        size, g = tf.identity(self._size.value), lin.gradient
        values, vectors = dense.eigenpairs(dense.matrix(lin.hessian(), g))
        slopes = tf.linalg.matvec(vectors, trees.flatten(g, tf.float64), transpose_a=True)
        name = "damping" if self.trust_region is None else "radius"
        finite = tf.math.is_finite(tf.reduce_sum(values)) & tf.math.is_finite(lin.loss)

        def attempt(size):
            step, checked = self._tried(lin, values, vectors, slopes, size)
            return Attempt(
                step, checked.accepted, finite, checked.value, {"reduction_ratio": checked.ratio, name: size}
            )  # fmt: skip

        adapts = self.trust_region is not None or self._rule.every
        nan = tf.constant(float("nan"), tf.float64)
        tried = first_taken(
            attempt, size, g, self.attempts if adapts else 1, **{"reduction_ratio": nan, name: size}
        )  # fmt: skip
        self.remember(self._size, tried.next)
        self.reject(tf.logical_not(tried.taken))
        self.report(lowest=values[0], gradient_max=trees.largest(g), **tried.reports)
        return trees.nan_unless(finite, tried.step)

    def _tried(self, lin, values, vectors, slopes, size):
        """`(step, Checked)` with one damping or radius."""
        if self.trust_region is None:
            shifted = (tf.abs(values) if self.eigenvalues == "absolute" else values) + tf.cast(size, tf.float64)
            p, rule = -tf.math.divide_no_nan(slopes, shifted), self._rule
        else:
            p, at_boundary = dense.minimize_in_ball(values, slopes, tf.cast(size, tf.float64))
            rule = self.trust_region.at(at_boundary)
        step = trees.unflatten(tf.linalg.matvec(vectors, p), lin.gradient)
        return step, Trial(rule, always=True).check(
            self.iterations, size, before=lin.loss, after=lambda: lin.loss_at(step),
            predicted=lambda: tf.reduce_sum(slopes * p + 0.5 * values * p * p),
        )  # fmt: skip

    def linear_step(self) -> NotLinear:
        """None: each step is tested on the loss."""
        return NotLinear(
            "`Newton` divides by the curvature itself and tests each step on the loss: it takes curvature into "
            "account, however large. Watch its `reduction_ratio`."
        )
