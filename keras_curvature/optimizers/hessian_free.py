"""Hessian-free optimization: conjugate gradients on the curvature of each batch."""

import dataclasses
from typing import Any, Literal, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import (
    check,
    check_choice,
    check_component,
    check_count,
    check_number,
    check_part,
    is_number,
    register,
)
from keras_curvature.linearization.gauss_newton import require_convex
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Diagonal, Identity, Scaled
from keras_curvature.optimizers import sketched
from keras_curvature.optimizers.arguments import with_needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import ConjugateGradient, Nystrom
from keras_curvature.steps import ArmijoLineSearch, Damping, LevenbergMarquardt, Trial, as_damping
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class HessianFree(CurvatureOptimizer):
    """Hessian-free optimization: truncated Newton steps by conjugate gradients.

        (B + lambda I) d = -g          solved from warm_start * (the last solution), preconditioned by
                                       (mean_i g_i^2 + lambda + l2)^(-preconditioner), g_i example by example
        d  <- the iterate where the loss stops improving, walking back from the end of conjugate gradients
        w  <- w + learning_rate * s d      with s from the line search; 0 rejects the step

    and `lambda` by the reduction ratio `(f(w + d) - f(w)) / (g'd + 1/2 d'Bd)` (the damping is not part of the model;
    the ratio is minus infinity where the loss rose). Use large batches: with a small batch the solution overfits the
    curvature of the batch. Costs one product (about 1.5 gradients) per iteration of conjugate gradients.

    Reference: Martens, "Deep learning via Hessian-free optimization" (2010), and his code; structural damping:
    Martens and Sutskever (2011); curvature batch: Kiros, "Training neural networks with stochastic Hessian-free
    optimization" (2013). Differences from the paper: (1) each batch of `fit` gives one step; for full-batch training,
    make the whole set the batch; (2) the per-example squares are exact for `Dense` layers and an unbiased estimate for
    others; (3) structural damping measures squared distance of hidden states, not cross-entropy; (4) a loss that is not
    finite rejects the step and raises the damping; a curvature product that is not finite skips the step, which
    `skipped_steps` counts and which halves a dynamic loss scale; (5) the damping begins at 1; his 45 suits one of his
    autoencoders.

    Args:
        learning_rate: Multiple of the accepted step. Defaults to `1.0`.
        damping: A number, or a component. Defaults to `LevenbergMarquardt.martens()`: from 1.0, times 2/3 above a ratio
            of 3/4, divided by 2/3 below 1/4.
        solver: A `ConjugateGradient`. Defaults to `ConjugateGradient(max_steps=250)` (Martens).
        line_search: An `ArmijoLineSearch`, or `None` for full steps. Defaults to `ArmijoLineSearch()` (Martens).
        curvature: `"gauss_newton"` or `"hessian"`. With the Hessian conjugate gradients end at the first direction of
            negative curvature. Defaults to `"gauss_newton"`.
        curvature_batch: Part of the batch that curvature products use, another part in each step: a share in (0, 1], a
            number of examples, or `None` for all. Defaults to `None`.
        warm_start: Share of the last solution to start from, in [0, 1]. Defaults to `0.95` (Martens).
        preconditioner: Exponent of the diagonal preconditioner, `0.0` for none; or `Nystrom()`, which takes the largest
            eigenvalues away. Defaults to `0.75` (Martens).
        structural_damping: `mu` in `lambda (I + mu J_h'J_h / N)`, for recurrent models. Defaults to `0.0`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping`, `reduction_ratio`, `cg_iterations`, `step_length` (of the line search), `step_norm`,
    `skipped_steps`; with `Nystrom()` `failed_refreshes`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.HessianFree(), loss="mse")
    model.fit(x, y, batch_size=1000)
    ```
    """

    needs = Needs(products=True)
    reports = {
        "damping": "last", "reduction_ratio": "mean", "cg_iterations": "mean", "step_length": "mean",
        "step_norm": "mean", "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, damping: float | Damping = LevenbergMarquardt.martens(),
        solver: ConjugateGradient = ConjugateGradient(), line_search: ArmijoLineSearch | None = ArmijoLineSearch(),
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton", curvature_batch: float | None = None,
        warm_start: float = 0.95, preconditioner: float | Nystrom = 0.75, structural_damping: float = 0.0,
        name: str = "hessian_free", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_choice(self, "curvature", curvature, ("gauss_newton", "hessian"))
        hessian = curvature == "hessian"
        needs = Needs(hessian=hessian, products=not (hessian and structural_damping == 0.0))
        super().__init__(learning_rate, name=name, **with_needs(kwargs, needs))
        self.damping, self.solver, self.line_search = damping, solver, line_search
        self.curvature, self.curvature_batch = curvature, curvature_batch
        self.warm_start, self.preconditioner, self.structural_damping = warm_start, preconditioner, structural_damping
        self._rule = as_damping(self, damping)
        self._trial = Trial(self._rule, accepts="any")  # the line search decides
        check_component(self, "solver", solver, "stores_iterates", "ConjugateGradient(max_steps=50)")
        if line_search is not None:
            check_component(self, "line_search", line_search, "search", "ArmijoLineSearch()")
        check_part(self, "curvature_batch", curvature_batch)
        check_number(self, "warm_start", warm_start, low=0, high=1)
        if isinstance(preconditioner, Nystrom):
            self.reports = {"failed_refreshes": "sum", **type(self).reports}
        else:
            valid = is_number(preconditioner) and 0 <= preconditioner <= 1
            check(self, "preconditioner", preconditioner, valid, "a number in [0, 1], or `Nystrom()`")
        check_number(self, "structural_damping", structural_damping, low=0)

    @classmethod
    def sgn(cls, rho: float = 1e-4, cg_steps: int = 10, **kwargs: Any) -> Self:
        """Stochastic Gauss-Newton: a few iterations of plain conjugate gradients from zero, and the full step.

        Reference: Gargiani, Zanelli, Diehl and Hutter, "On the promise of the stochastic generalized Gauss-Newton
        method for training DNNs" (2020), Algorithm 1.

        Args:
            rho: The damping. Defaults to `1e-4` (the paper).
            cg_steps: Iterations of conjugate gradients. Defaults to `10` (the paper).
            **kwargs: Arguments of the constructor.

        Example: `HessianFree.sgn(learning_rate=0.5)`
        """
        check_number(cls, "rho", rho, low=0)
        check_count(cls, "cg_steps", cg_steps)
        solver = ConjugateGradient(max_steps=cg_steps, progress_tolerance=0.0)
        plain = {"line_search": None, "warm_start": 0.0, "preconditioner": 0.0}
        return cls(**{"damping": rho, "solver": solver, "name": "sgn", **plain, **kwargs})

    def create_state(self, variables: Variables) -> None:
        """The last end point of conjugate gradients, and the damping; the sketch of `Nystrom()`."""
        self._last = self.add_optimizer_variables(variables, "solution")
        self._damping = self.add_scalar(self._rule.initial, "damping")
        if isinstance(self.preconditioner, Nystrom):
            self._vectors, self._values = sketched.create_sketch(self, variables, self.preconditioner.rank)

    def direction(self, lin: Linearization) -> Vector:
        """The accepted step."""
        damping, g = tf.identity(self._damping.value), lin.gradient
        batch = lin if self.curvature_batch is None else lin.chunk(self.curvature_batch, self.iterations)
        if self.curvature == "hessian":
            B, solver = batch.hessian(), dataclasses.replace(self.solver, truncate=True)
        else:
            B, solver = batch.gauss_newton(), self.solver
            require_convex(B, "HessianFree", 'Choose another loss, or `HessianFree(curvature="hessian")`.')
        A = B + Scaled(damping, Identity(), nonnegative=True)
        if self.structural_damping:
            A = A + Scaled(damping * self.structural_damping, batch.hidden_gauss_newton(), nonnegative=True)

        start = trees.scale(self.warm_start, trees.values(self._last))
        solution = solver.solve(A, trees.negative(g), start, self._inverse(lin, B, damping))
        solved = trees.where(trees.is_finite(solution.value), solution.value, trees.zeros_like(g))
        step, quadratic, loss = self._backtrack(lin, solution)

        checked = self._trial.check(
            self.iterations, damping, before=batch.loss,
            after=lambda: loss if batch is lin else batch.loss_at(step),
            predicted=lambda: self._predicted(lin.gradient, B, step, quadratic, damping),
        )  # fmt: skip
        length = self._length(lin, step, loss)
        self.remember(self._last, solved)
        self.remember(self._damping, checked.value)
        self.reject(tf.equal(length, 0.0))
        self.report(damping=damping, reduction_ratio=checked.ratio, cg_iterations=solution.steps, step_length=length)
        # a rejected step may be NaN although the batch is fine
        step = trees.where(length > 0, trees.scale(length, step), trees.zeros_like(step))
        # an overflowed product ends the iteration: the step is skipped, not taken with length zero
        return trees.nan_unless(solution.finite, step)

    def linear_step(self) -> NotLinear:
        """None: each step solves anew."""
        return NotLinear(
            "`HessianFree` solves for the minimum of a quadratic model of each batch and tests the step on the loss: "
            "it takes curvature into account, however large. Watch its `reduction_ratio` and `damping`."
        )

    def _inverse(self, lin, B, damping):
        """The preconditioner, an operator: of squares of gradients, or of the sketch of `B`."""
        if not isinstance(self.preconditioner, Nystrom):
            return self._preconditioner(lin, damping)
        state = self._vectors, self._values
        return sketched.preconditioner(self, state, B, lin.weights, self.preconditioner.every, damping)

    def _preconditioner(self, lin, damping):
        """`(mean_i g_i^2 + lambda + l2)^-exponent`, an operator; `None` if it is switched off."""
        if not self.preconditioner:
            return None
        squares = lin.squared_gradients(seed=tf.cast(self.iterations, tf.int32))
        entries = [s + tf.cast(damping, s.dtype) + l2 for s, l2 in zip(squares, lin.l2)]
        # an input that is always 0 and no damping: that weight has no gradient, and any entry will do
        powers = [tf.where(e > 0, tf.pow(e, -self.preconditioner), tf.ones_like(e)) for e in entries]
        return Diagonal([p + 0.0 * e for p, e in zip(powers, entries)])  # NaN, not 0, where a square overflowed

    def _backtrack(self, lin, solution):
        """`(step, its quadratic, loss)`: from the last stored iterate backwards, as long as the loss gets better."""

        def back(j, loss, go_on):
            earlier = lin.loss_at(solution.iterate(j - 1))
            go_on = (loss >= earlier) | tf.math.is_nan(loss)  # not yet worse: a tie continues, and a NaN is passed over
            return tf.where(go_on, j - 1, j), tf.where(go_on, earlier, loss), go_on

        # a NaN stands behind the last iterate: the loop evaluates the last one too, and the graph has one forward pass
        behind = solution.count, tf.constant(float("nan"), lin.loss.dtype), True
        j, loss, _ = tf.while_loop(lambda j, loss, go_on: go_on & (j > 0), back, behind)
        return solution.iterate(j), solution.quadratic(j), loss

    def _predicted(self, gradient, B, step, quadratic, damping):
        """`g's + 1/2 s'Bs`; it is what the solver minimized without the damping, so it takes no other product."""
        if self.structural_damping:
            return trees.dot(gradient, step) + 0.5 * B.quadratic_form(step, step)
        return quadratic - 0.5 * tf.cast(damping, quadratic.dtype) * trees.squared_norm(step)

    def _length(self, lin, step, loss):
        """The share of the step to take; zero if its loss is not finite."""
        if self.line_search is None:
            return tf.cast(tf.math.is_finite(loss) & trees.is_finite(step), loss.dtype)
        slope = tf.cast(trees.dot(lin.gradient, step), loss.dtype)
        along = lambda s: lin.loss_at(trees.scale(s, step))  # noqa: E731
        return self.line_search.search(along, lin.loss, slope, loss)[0]
