"""CurveBall: one heavy-ball step on the damped quadratic per batch."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_number, register
from keras_curvature.linearization.gauss_newton import require_convex
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import LinearStep, NotLinear, OnTheQuadratic
from keras_curvature.steps import Damping, LevenbergMarquardt, Trial, as_damping, quadratic
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class CurveBall(CurvatureOptimizer):
    """CurveBall: one step of momentum per batch towards the Newton step, instead of solving for it.

        dz = (G + lambda I) z + g                    gradient of the damped quadratic at the last step z
        z  <- rho z - beta dz
        w  <- w + learning_rate * z

    with the `beta` and `rho` that minimize the quadratic over the two directions, a 2x2 system. Costs one backward
    and two forward-mode passes on top of the forward pass, and one copy of the weights.

    Reference: Henriques, Ehrhardt, Albanie and Vedaldi, "Small steps and giant leaps" (2018), Algorithm 1 and
    equations 15-19, and the authors' code. Differences from the paper: (1) the 2x2 system is solved in closed form
    and, where its directions are parallel (always at the first step), falls back to the line search along `dz`;
    (2) the change of the damping is compounded over the steps between two checks, as in the authors' code;
    (3) the loss after the step, for the reduction ratio, is evaluated with the batch's dropout masks, and moves no
    batch statistics; (4) a checked step whose loss is not finite is not taken, and `z` begins again at zero.

    Args:
        learning_rate: Factor on `z`. Defaults to `1.0`.
        damping: A number, or a component. Defaults to `LevenbergMarquardt(initial=1.0, decay=0.999, low=0.5,
            high=1.5, every=5)` (the paper, for networks with batch normalization; 10 without).
        beta: Length along `-dz`, a number, given together with `rho`; `None`: both are those of the minimum of the
            quadratic. Defaults to `None`.
        rho: Factor on the last `z`, given together with `beta`. Defaults to `None`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping`, `beta`, `rho`, `reduction_ratio` (at the checks), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.CurveBall(), loss="mse")
    ```
    """

    needs = Needs(products=True)
    reports = {
        "damping": "last", "beta": "mean", "rho": "mean", "reduction_ratio": "mean", "step_norm": "mean",
        "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, damping: float | Damping = LevenbergMarquardt(),
        beta: float | None = None, rho: float | None = None, name: str = "curveball", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.beta, self.rho = damping, beta, rho
        self._rule = as_damping(self, damping)
        self._trial = Trial(self._rule, accepts="finite")  # the loss of a batch may rise, as with any momentum
        for name, value in (("beta", beta), ("rho", rho)):
            check_number(self, name, value, or_none=True)
        check(self, "rho", rho, (beta is None) == (rho is None), f"given together with `beta` ({beta}), or neither")

    def create_state(self, variables: Variables) -> None:
        """`z`, and the damping."""
        self._z = self.add_optimizer_variables(variables, "z")
        self._damping = self.add_scalar(self._rule.initial, "damping")

    def direction(self, lin: Linearization) -> Vector:
        """The next `z`."""
        G = lin.gauss_newton()
        require_convex(G, "CurveBall", "Choose another loss, or an optimizer that does not need a convex loss.")
        z, damping = trees.values(self._z), tf.identity(self._damping.value)

        Jz = G.push(z)
        dz = trees.add(G.pull_with_gradient(Jz), z, damping)
        Jdz = G.push(dz)

        # curvatures and slopes of the directions dz and z; g = dz - (G + lambda) z, so its slopes need no pass
        dz_dz, dz_z, z_z = trees.squared_norm(dz), trees.dot(dz, z), trees.squared_norm(z)
        lam = tf.cast(damping, dz_dz.dtype)
        A = G.gram(Jdz, Jz) + lam * tf.stack([tf.stack([dz_dz, dz_z]), tf.stack([dz_z, z_z])])
        b = tf.stack([dz_dz - A[0, 1], dz_z - A[1, 1]])
        c = quadratic.minimize(A, b) if self.beta is None else tf.constant([-self.beta, self.rho], A.dtype)
        z = trees.add(trees.scale(c[1], z), dz, c[0])

        rate = tf.cast(self.learning_rate, A.dtype)
        checked = self._trial.check(
            self.iterations, damping, before=lin.loss, after=lambda: lin.loss_at(trees.scale(rate, z)),
            predicted=lambda: quadratic.value(A, b, rate * c),
        )  # fmt: skip
        self.remember(self._damping, checked.value)
        if self._trial.looks:
            self.reject(tf.logical_not(checked.accepted))
            # a condition, because `where` copies
            self.remember(self._z, tf.cond(checked.accepted, lambda: z, lambda: trees.zeros_like(z)))
        else:
            self.remember(self._z, z)
        # |z| from the inner products, without a pass over it
        squared = c[0] * c[0] * dz_dz + 2.0 * c[0] * c[1] * dz_z + c[1] * c[1] * z_z
        squared = tf.where(squared < 0, tf.zeros_like(squared), squared)  # by rounding; not `maximum`, a NaN must stay
        self.report(
            damping=damping, beta=-c[0], rho=c[1], reduction_ratio=checked.ratio, step_norm=tf.sqrt(squared)
        )  # fmt: skip
        return z

    def linear_step(self) -> LinearStep | NotLinear:
        """With fixed `beta` and `rho`, momentum on the quadratic itself; else no known limit."""
        if self.beta is None or self.rho is None:
            return NotLinear(
                "`CurveBall` sets the length of each step, and its momentum, by the curvature of the batch: it takes "
                "curvature into account, however large. Watch its `reduction_ratio` and `damping`."
            )
        damping = float(tf.convert_to_tensor(self._damping)) if self.built else self._rule.initial
        note = "The limit takes the Gauss-Newton matrix, with which the steps are made, for the Hessian."
        return LinearStep(OnTheQuadratic(self.rho, self.beta, damping), note=note)
