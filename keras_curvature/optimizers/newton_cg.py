"""Newton's method in a trust region, by conjugate gradients."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_count, check_number, register
from keras_curvature.linearization.gauss_newton import require_convex
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.arguments import with_needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers.steihaug import steihaug
from keras_curvature.steps import Trial, TrustRegion
from keras_curvature.steps.trial import Attempt, first_taken
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class NewtonCG(CurvatureOptimizer):
    """Newton's method in a trust region: negative curvature is followed to the sphere, so saddles are left.

        p = argmin g'p + 1/2 p'B p  over  |p| <= radius        by conjugate gradients from zero (Steihaug),
                                                               until |g + B p| <= min(tolerance, sqrt|g|) |g|
        w <- w + learning_rate * p  if the loss falls, else the weights stay

    and the radius grows or shrinks with `(f(w + p) - f(w)) / (g'p + 1/2 p'Bp)`. For full or large batches: with a small
    one the step overfits the batch. Costs a product (about two gradients) per iteration of conjugate gradients and one
    evaluation of the loss. If the loss rises, the next attempt is shorter, up to `attempts` times; then the weights
    stay bit-identical.

    Reference: Steihaug (1983); Nocedal and Wright, "Numerical Optimization" (2006), Algorithms 4.1 and 7.2.
    Differences: (1) each batch of `fit` gives one step; (2) a product that is not finite skips the step, which
    `skipped_steps` counts.

    Args:
        learning_rate: Multiple of the accepted step. Defaults to `1.0`.
        curvature: `"hessian"` or `"gauss_newton"`. Defaults to `"hessian"`.
        trust_region: A `TrustRegion`. Defaults to `TrustRegion()`: a radius of 1 at first.
        max_steps: Largest number of iterations of conjugate gradients. Defaults to `250`.
        tolerance: Largest relative residual to end at, in (0, 1). Defaults to `0.5` (Nocedal and Wright).
        attempts: Most radii that a step tries; each costs what a step costs. Defaults to `10`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `radius`, `reduction_ratio`, `cg_iterations`, `gradient_max` (largest entry, before the step), `step_norm`,
    `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.NewtonCG(), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=100)
    ```
    """

    reports = {
        "radius": "last", "reduction_ratio": "mean", "cg_iterations": "mean", "gradient_max": "last",
        "step_norm": "mean", "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, curvature: Literal["hessian", "gauss_newton"] = "hessian",
        trust_region: TrustRegion = TrustRegion(), max_steps: int = 250, tolerance: float = 0.5,
        attempts: int = 10, name: str = "newton_cg", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_choice(self, "curvature", curvature, ("gauss_newton", "hessian"))
        hessian = curvature == "hessian"
        needs = Needs(hessian=hessian, products=not hessian)
        super().__init__(learning_rate, name=name, **with_needs(kwargs, needs))
        self.curvature, self.trust_region = curvature, trust_region
        self.max_steps, self.tolerance, self.attempts = max_steps, tolerance, attempts
        check(self, "trust_region", trust_region, isinstance(trust_region, TrustRegion), "a `TrustRegion()`")
        check_count(self, "max_steps", max_steps)
        check_count(self, "attempts", attempts)
        check_number(self, "tolerance", tolerance, low=0, high=1, open_low=True, open_high=True)

    def create_state(self, variables: Variables) -> None:
        """The radius."""
        self._radius = self.add_scalar(self.trust_region.initial, "radius")

    def direction(self, lin: Linearization) -> Vector:
        """The accepted step."""
        g, radius = lin.gradient, tf.identity(self._radius.value)
        if self.curvature == "hessian":
            B = lin.hessian()
        else:
            B = lin.gauss_newton()
            require_convex(B, "NewtonCG", 'Choose another loss, or `NewtonCG(curvature="hessian")`.')
        norm = trees.norm(g)
        tolerance, loss = tf.minimum(tf.cast(self.tolerance, norm.dtype), tf.sqrt(norm)), lin.loss

        def attempt(radius):
            found = steihaug(B, g, radius, self.max_steps, tolerance)
            checked = Trial(self.trust_region.at(found.at_boundary)).check(
                self.iterations, radius, before=loss, after=lambda: lin.loss_at(found.value),
                predicted=lambda: found.change,
            )  # fmt: skip
            reports = {"radius": radius, "reduction_ratio": checked.ratio, "cg_iterations": found.steps}
            return Attempt(found.value, checked.accepted, found.finite, checked.value, reports)

        tried = first_taken(
            attempt, radius, g, self.attempts, radius=radius, reduction_ratio=tf.constant(float("nan"), tf.float64),
            cg_iterations=tf.constant(0),
        )  # fmt: skip
        self.remember(self._radius, tried.next)
        self.reject(tf.logical_not(tried.taken))
        self.report(gradient_max=trees.largest(g), **tried.reports)
        # an overflowed product ends the iteration: the step is skipped
        return trees.nan_unless(tried.finite, tried.step)

    def linear_step(self) -> NotLinear:
        """None: each step is tested on the loss."""
        return NotLinear(
            "`NewtonCG` minimizes a quadratic model of each batch in a ball and tests the step on the loss: it takes "
            "curvature into account, however large. Watch its `reduction_ratio` and `radius`."
        )
