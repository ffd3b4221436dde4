"""The idealised Neumann optimizer: an inner loop of gradients at shifted points of one batch."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_component, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import NeumannSeries
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class TwoLoopNeumann(CurvatureOptimizer):
    """Two-loop Neumann: `K` gradients at shifted points of the same batch approximate one Newton step.

        m_0 = -grad f(w)
        m_k = m_{k-1} - grad f(w + eta m_{k-1}),       k = 1..K
        w  <- w + learning_rate * m_K

    with `K` and `eta` the `steps` and `rate` of the solver. On a quadratic `m_K = -sum_{i<=K} (I - eta H)^i g`,
    which tends to `-(eta H)^-1 g`: with `learning_rate = eta` the step tends to Newton's. With `mu < 1` the
    convexified form (equation 9), written for `m` without the factor `eta`:

        m_k = mu m_{k-1} - grad g(w + eta mu m_{k-1}),      fixed point  -[eta mu H + (1 - mu) I]^-1 g

    a damped Newton step, for `g(w) = f(w) + alpha/3 |w - v|^3 + beta n / |w - v|`. Costs `K + 1` gradients and, with
    `alpha` or `beta`, one copy of the weights (`v`).

    Reference: Krishnan, Xiao and Saurous (ICLR 2018), Algorithm 1 and section 3.1. Differences from the paper: (1)
    `mu` and `eta` are arguments; the paper measures them from extreme eigenvalues on each batch; (2) the repulsion is
    floored as in `Neumann`, at the distance `|eta g|` of one gradient step.

    Args:
        learning_rate: The paper's `eta_out`. Defaults to `0.05`.
        solver: `NeumannSeries(steps=K, rate=eta)`. Defaults to `NeumannSeries(steps=10, rate=0.05)`.
        mu: The `mu` of the convexified form, in (0, 1]; 1 is Algorithm 1. Defaults to `1.0`.
        alpha: Weight of the cubic regularizer. Defaults to `0.0`.
        beta: Weight of the repulsion, times the number of weights. Defaults to `0.0`.
        gamma: Decay of the moving average `v`, in [0, 1). Defaults to `0.99`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    series = keras_curvature.NeumannSeries(steps=20, rate=0.01)
    model.compile(optimizer=keras_curvature.TwoLoopNeumann(solver=series), loss="mse")
    ```
    """

    needs = Needs()
    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.05, solver: NeumannSeries = NeumannSeries(steps=10, rate=0.05),
        mu: float = 1.0, alpha: float = 0.0, beta: float = 0.0, gamma: float = 0.99, name: str = "two_loop_neumann",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.solver, self.mu, self.alpha, self.beta, self.gamma = solver, mu, alpha, beta, gamma
        check_component(self, "solver", solver, "rate", "NeumannSeries(steps=10)")
        check_number(self, "mu", mu, low=0, high=1, open_low=True)
        check_number(self, "alpha", alpha, low=0)
        check_number(self, "beta", beta, low=0)
        check_number(self, "gamma", gamma, low=0, high=1, open_high=True)

    def create_state(self, variables: Variables) -> None:
        """`v`, if a regularizer is centred on it; the first step initializes it with the weights."""
        self._v = self.add_optimizer_variables(variables, "v") if self.alpha or self.beta else []

    def direction(self, lin: Linearization) -> Vector:
        """`m_K`, the sum of the series for `A = mu (grad g(w + x) - grad g(w)) + (1 - mu)/eta x`."""
        eta, mu = self.solver.rate, self.mu
        regularizer = self._regularizer(lin)
        gradient = trees.add(lin.gradient, regularizer(None)) if regularizer else lin.gradient

        def product(x):
            shifted = trees.scale(mu, x)
            there = lin.gradient_at(shifted)
            there = trees.add(there, regularizer(shifted)) if regularizer else there
            change = trees.subtract(there, gradient)
            return change if mu == 1.0 else trees.add(change, x, (1.0 - mu) / eta)

        # Richardson's iteration needs products only, whatever their sign
        solution = self.solver.solve(Function(product), trees.negative(gradient))
        direction = trees.scale(1.0 / eta, solution.value)
        if self._v:
            rate = tf.cast(self.learning_rate, trees.scalar_dtype(direction))
            after, v = trees.add(lin.weights, direction, rate), self._center(lin)
            self.remember(self._v, trees.add(after, trees.subtract(v, after), self.gamma))
        return direction

    def linear_step(self) -> NotLinear:
        """None: the inner loop is a polynomial in the curvature."""
        return NotLinear(
            "`TwoLoopNeumann` makes each step of several gradients at shifted points, and its limit is that of this "
            "inner loop: it needs the sharpness to be below 2 / solver.rate."
        )

    def _center(self, lin):
        """`v`; at the first step the weights."""
        return trees.where(tf.equal(self.iterations, 0), lin.weights, trees.values(self._v))

    def _regularizer(self, lin):
        """Gradient of the two regularizers at `w + x`, as a function of `x`; `None` without regularizers."""
        if not self._v:
            return None
        v, weight = self._center(lin), self.beta * trees.count(lin.weights)
        floor = self.solver.rate * trees.norm(lin.gradient)

        def gradient(x):
            away = trees.subtract(lin.weights if x is None else trees.add(lin.weights, x), v)
            r = trees.norm(away)
            pull = self.alpha * r - tf.math.divide_no_nan(tf.constant(weight, r.dtype), tf.maximum(r, floor) ** 3)
            return trees.scale(pull, away)

        return gradient
