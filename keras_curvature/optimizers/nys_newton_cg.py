"""NysNewton-CG: damped Newton steps by conjugate gradients with a Nyström preconditioner."""

import dataclasses
from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice, check_component, check_count, check_number, register
from keras_curvature.linearization.gauss_newton import require_convex
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Identity, Scaled
from keras_curvature.optimizers import sketched
from keras_curvature.optimizers.arguments import with_needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import ConjugateGradient
from keras_curvature.steps import ArmijoLineSearch
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class NysNewtonCG(CurvatureOptimizer):
    """NysNewton-CG: the last digits of an ill-conditioned full-batch problem, after Adam and L-BFGS.

    With a small batch a step goes to the minimum of that batch, and the loss of all data may rise without bound.

        (B + damping I) d = g      by conjugate gradients from the last d, preconditioned by
                                   P^-1 = U diag((l_r + mu) / (l + mu)) U' + I - U U'
        w <- w - learning_rate * s d      with s from the line search; 0 rejects the step

    with `U diag(l) U'` the Nyström approximation of `B` from `rank` products, renewed every `every` steps. The
    preconditioner takes the largest eigenvalues away, on which conjugate gradients would spend their iterations. Costs
    one product per iteration, `rank` products every `every` steps, and `rank + 1` copies of the weights.

    Reference: Rathore, Lei, Frangella, Lu and Udell, "Challenges in training PINNs: a loss landscape perspective"
    (2024), Algorithms 4 to 6, and the authors' code. Differences from the paper: (1) where `d` does not descend, the
    step is the preconditioned gradient; (2) conjugate gradients end at a direction of negative curvature; (3) a shift
    for a sketch that is not positive definite is also in `Y` (the code has it in the factor only); (4) `learning_rate`
    multiplies the length that the search found.

    Args:
        learning_rate: Multiple of the accepted step. Defaults to `1.0`.
        rank: Number of vectors of the sketch. Defaults to `50` (DeepXDE).
        damping: `mu`, positive. Defaults to `1e-1` (DeepXDE; the authors tune it from 1e-5 to 1e-1).
        every: Steps between two sketches. Defaults to `20` (the authors).
        curvature: `"hessian"` or `"gauss_newton"`. Defaults to `"hessian"` (the authors).
        solver: A `ConjugateGradient`. Defaults to at most 250 iterations to a relative residual of 1e-8 (the authors:
            1000 to 1e-16).
        line_search: An `ArmijoLineSearch`. Defaults to `ArmijoLineSearch(slope=0.1, shrink=0.5)` (the authors).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `cg_iterations`, `residual`, `step_length`, `gradient_max` (largest entry, before the step), `step_norm`,
    `failed_refreshes`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.NysNewtonCG(damping=1e-2), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=200)
    ```
    """

    reports = {
        "cg_iterations": "mean", "residual": "mean", "step_length": "mean", "gradient_max": "last",
        "step_norm": "mean", "failed_refreshes": "sum", "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, rank: int = 50, damping: float = 1e-1, every: int = 20,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
        solver: ConjugateGradient = ConjugateGradient(progress_tolerance=0.0, residual_tolerance=1e-8),
        line_search: ArmijoLineSearch = ArmijoLineSearch(slope=0.1, shrink=0.5), name: str = "nys_newton_cg",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        check_choice(self, "curvature", curvature, ("gauss_newton", "hessian"))
        hessian = curvature == "hessian"
        needs = Needs(hessian=hessian, products=not hessian)
        super().__init__(learning_rate, name=name, **with_needs(kwargs, needs))
        self.rank, self.damping, self.every, self.curvature = rank, damping, every, curvature
        self.solver, self.line_search = solver, line_search
        check_count(self, "rank", rank)
        check_number(self, "damping", damping, low=0, open_low=True)
        check_count(self, "every", every)
        check_component(self, "solver", solver, "stores_iterates", "ConjugateGradient(max_steps=50)")
        check_component(self, "line_search", line_search, "search", "ArmijoLineSearch()")

    def create_state(self, variables: Variables) -> None:
        """The sketch, and the last solution."""
        self._last = self.add_optimizer_variables(variables, "solution")
        self._vectors, self._values = sketched.create_sketch(self, variables, self.rank)

    def direction(self, lin: Linearization) -> Vector:
        """The accepted step."""
        g = lin.gradient
        if self.curvature == "hessian":
            B = lin.hessian()
        else:
            B = lin.gauss_newton()
            require_convex(B, "NysNewtonCG", 'Choose another loss, or `NysNewtonCG(curvature="hessian")`.')

        P = sketched.preconditioner(self, (self._vectors, self._values), B, g, self.every, self.damping)
        A = B + Scaled(self.damping, Identity(), nonnegative=True)
        solver = dataclasses.replace(self.solver, truncate=True)
        solution = solver.solve(A, g, trees.values(self._last), P)
        slope = trees.dot(g, solution.value)
        descends = slope > 0  # false for a NaN
        d = trees.negative(trees.where(descends, solution.value, P @ g))
        slope = tf.cast(trees.dot(g, d), lin.loss.dtype)

        along = lambda s: lin.loss_at(trees.scale(s, d))  # noqa: E731
        length, _ = self.line_search.search(along, lin.loss, slope, along(tf.ones_like(lin.loss)))
        self.remember(self._last, trees.where(descends, solution.value, trees.zeros_like(g)))
        self.reject(tf.equal(length, 0.0))
        self.report(
            cg_iterations=solution.steps, residual=solution.residual, step_length=length, gradient_max=trees.largest(g)
        )  # fmt: skip
        step = trees.where(length > 0, trees.scale(length, d), trees.zeros_like(d))
        # an overflowed product ends the iteration: the step is skipped, not taken with length zero
        return trees.nan_unless(solution.finite, step)

    def linear_step(self) -> NotLinear:
        """None: each step solves anew and tests its length."""
        return NotLinear(
            "`NysNewtonCG` solves for the minimum of a quadratic model of each batch and tests the step on the loss: "
            "it takes curvature into account, however large. Watch its `step_length` and `residual`."
        )
