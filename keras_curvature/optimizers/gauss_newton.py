"""Gauss-Newton and Levenberg-Marquardt: regression, small networks and physics-informed networks to round-off."""

import math
from typing import Any, Literal, Self, TypeAlias

import keras
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_component, check_count, check_number, register
from keras_curvature.linearization.gauss_newton import require_convex
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers import local_models
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import ConjugateGradient
from keras_curvature.solvers.least_squares import scale_of
from keras_curvature.steps import ArmijoLineSearch, Damping, GridSearch, Nielsen, Trial, as_damping
from keras_curvature.steps.trial import Attempt, first_taken
from keras_curvature.typing import LearningRate, Variables, Vector

SCALINGS = ("identity", "marquardt", "more")
# Largest share of the length of a step that its correction by the geodesic acceleration may have (Transtrum, Sethna).
LARGEST_BEND = 0.75
ORDERS = (2, 3, 4)

By: TypeAlias = Literal["auto", "rows", "weights", "qr", "svd"] | ConjugateGradient


@register
class GaussNewton(CurvatureOptimizer):
    """Damped Gauss-Newton steps, solved to the end: Levenberg-Marquardt, natural gradients of PINNs, SPRING.

        d = argmin_d  f + g'd + 1/2 d'Gd + 1/2 lambda |D (d - momentum * d_last)|^2,        G = J' H_L J
        w <- w + learning_rate * (s d + s^2/2 a + ...)       s from the line search, a the geodesic acceleration

    With a damping that adapts, a step that raises the loss is tried again with a larger `lambda`. If none of `attempts`
    lowers the loss, the weights stay bit-identical, and the next step goes on from the last `lambda`. With a number for
    `damping` and no line search every finite step is taken, and the loss may rise. Made for problems where the batch is
    the whole set, in float64: least squares to round-off. Pass `batch_size=len(x)` to `fit`. On mini-batches it is the
    Gram-Gauss-Newton method. Any loss works that is convex in the model's outputs.

    `solver` chooses how the system is solved, and after a step the attribute `solved_by` tells how it was; the result
    is the same. The rows of the Jacobian are an array `(N, n)` for `N` outputs and `n` weights. From it, `"rows"` forms
    a matrix `(N, N)`, `"weights"` a matrix `(n, n)`, and `"qr"` and `"svd"` decompose the array. Conjugate gradients
    need no array. Nor does `"rows"` with `scaling="identity"`, in models of Keras' layers without batch normalization:
    it forms its matrix layer by layer.

    References: Levenberg (1944); Marquardt (1963); More, "The Levenberg-Marquardt algorithm: implementation and theory"
    (1978), for `D`; Nielsen (1999), for `lambda`; Transtrum and Sethna, "Improvements to the Levenberg-Marquardt
    algorithm for nonlinear least-squares minimization" (2012), for `a`; Mueller and Zeinhofer (2023), energy natural
    gradients; Goldshlager, Abrahamsen and Lin, "A Kaczmarz-inspired approach to accelerate the optimization of neural
    network wavefunctions" (2024), Algorithm 1, SPRING; Cai et al., "Gram-Gauss-Newton method" (2019), Algorithm 1.
    Differences: (1) the scale is that of the compiled loss: for a mean of N squares `lambda` is 2/N times the one of
    the sum of 1/2 r^2; (2) the acceleration uses central second differences of the outputs along `d`, and for losses
    other than squares the metric `H_L` at the weights; (3) without a line search, a step with `2 |D a| > 0.75 |D d|` is
    taken back where the damping adapts in that step, and else taken without `a`; a line search tries points of the
    curve, and the damping is that of the whole step, also where the search took a part of it; (4) orders above 2
    are ours: each vector solves the same system for the next derivative of the outputs along the path so far; (5)
    SPRING's rows are not centred, and its momentum begins again at zero after a rejected step.

    Args:
        learning_rate: Multiple of the step. Defaults to `1.0`.
        damping: A number, or a component. `0.0` needs `solver="svd"` (or `"auto"`). Defaults to `Nielsen()`.
        solver: `"rows"`, `"weights"`, `"qr"`, `"svd"`, a `ConjugateGradient`, or `"auto"`: `"rows"` if there are fewer
            rows than weights, else `"qr"` where it is quick (about 750 weights), else `"weights"`; conjugate gradients
            if the array needs more than `memory`, or if the model has its own `compute_loss` without a `likelihood`.
            Defaults to `"auto"`.
        scaling: `D`: `"identity"`; `"marquardt"`, the norms of the columns of the rows; or `"more"`, the largest norm
            of each column so far. The last two need the rows. A column of zeros, or of rounding alone (the bias of the
            keys of attention, or before normalization), counts as the longest. Defaults to `"identity"`.
        geodesic: Whether to add the geodesic acceleration, which costs two forward passes; or the order of the path: 2
            (the same as `True`), 3 or 4, which cost four more each. Physics-informed networks need the fewest steps
            with `4`, `scaling="more"` and `line_search=GridSearch(count=5)`. Defaults to `False`.
        momentum: Share of the last step that the damping pulls to, in [0, 1). Defaults to `0.0`.
        line_search: `GridSearch()`, `ArmijoLineSearch()`, or `None` for full steps. Defaults to `None`.
        memory: The most bytes that the array of rows may take. Defaults to `2**31`.
        attempts: Most dampings that a step tries, all with the same rows, for a damping that adapts. An attempt costs a
            solution and the loss of the batch. Defaults to `10`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping`, `reduction_ratio`, `cg_iterations` (0 without conjugate gradients), `step_length` (of the line
    search; 0 for a step taken back), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.GaussNewton.levenberg_marquardt(), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=200)
    ```
    """

    needs = Needs(products=True, gram=True)
    reports = {
        "damping": "last", "reduction_ratio": "mean", "cg_iterations": "mean", "step_length": "mean",
        "step_norm": "mean", "skipped_steps": "sum",
    }  # fmt: skip
    solved_by: str | None = None

    def __init__(
        self, learning_rate: LearningRate = 1.0, damping: float | Damping | Nielsen = Nielsen(), solver: By = "auto",
        scaling: Literal["identity", "marquardt", "more"] = "identity", geodesic: bool | Literal[2, 3, 4] = False,
        momentum: float = 0.0, line_search: GridSearch | ArmijoLineSearch | None = None, memory: int = 2**31,
        attempts: int = 10, name: str = "gauss_newton", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.solver, self.scaling, self.geodesic = damping, solver, scaling, geodesic
        self.momentum, self.line_search, self.memory, self.attempts = momentum, line_search, memory, attempts
        self._rule = as_damping(self, damping, numbers=2)
        self._trial = Trial(self._rule, accepts="lower")
        if not isinstance(solver, ConjugateGradient):
            check_choice(self, "solver", solver, ("auto", *local_models.WAYS), local_models.EXPECTED)
        check_choice(self, "scaling", scaling, SCALINGS)
        valid = isinstance(geodesic, bool) or (isinstance(geodesic, int) and geodesic in ORDERS)
        check(self, "geodesic", geodesic, valid, "True, False, or the order of the path: 2, 3 or 4")
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True)
        if line_search is not None:
            check_component(self, "line_search", line_search, "search", "GridSearch()")
        check_count(self, "attempts", attempts)
        check_number(self, "memory", memory, low=0, open_low=True)
        undamped = self._rule.every is None and self._rule.initial == 0.0
        valid = not undamped or (solver in ("auto", "svd") and not momentum)
        check(self, "damping", damping, valid, 'positive, but for `solver="svd"` without momentum')
        valid = scaling == "identity" or not isinstance(solver, ConjugateGradient)
        check(self, "scaling", scaling, valid, '"identity" with conjugate gradients, which know no column norms')

    # Presets.

    @classmethod
    def levenberg_marquardt(cls, **kwargs: Any) -> Self:
        """Levenberg-Marquardt with the scaling of More, Nielsen's damping and geodesic acceleration.

        Example: `GaussNewton.levenberg_marquardt()`
        """
        return cls(**{"damping": Nielsen(), "scaling": "more", "geodesic": True, **kwargs})

    @classmethod
    def energy_natural_gradient(cls, **kwargs: Any) -> Self:
        """The energy natural gradient of Mueller and Zeinhofer (2023): the shortest solution, and a grid search.

        Example: `GaussNewton.energy_natural_gradient()`
        """
        return cls(**{"damping": 0.0, "solver": "svd", "line_search": GridSearch(), **kwargs})

    @classmethod
    def spring(cls, **kwargs: Any) -> Self:
        """SPRING (Goldshlager et al., 2024), with the numbers of its code, vmcnet.

        Its damping 1e-3 belongs to a mean of 1/2 r^2, and is 2e-3 with `loss="mse"`. Its bound on the step, `|w_new -
        w|^2 <= 1e-3`, is not set: Keras' `global_clipnorm` bounds the step before the learning rate.

        Example: `GaussNewton.spring(learning_rate=0.01)`
        """
        falling = keras.optimizers.schedules.InverseTimeDecay(0.05, 1, 1e-4)
        return cls(**{"learning_rate": falling, "damping": 2e-3, "momentum": 0.99, "solver": "rows", **kwargs})

    @classmethod
    def gram(cls, **kwargs: Any) -> Self:
        """The Gram-Gauss-Newton method of Cai et al. (2019) for mini-batches: solved in rows, a constant damping.

        As in the paper, nothing checks a step: with little damping the loss may rise. A step that is not finite is not
        taken, such as one from a Gram matrix that is singular in its precision.

        Example: `GaussNewton.gram(damping=0.1)`
        """
        return cls(**{"damping": 1.0, "solver": "rows", **kwargs})

    def create_state(self, variables: Variables) -> None:
        """The damping, the last step with momentum, and with More's scaling the largest column norms."""
        self._damping = self.add_damping(self._rule)
        self._last = self.add_optimizer_variables(variables, "last_step") if self.momentum else []
        self._norms = self.add_optimizer_variables(variables, "column_norms") if self.scaling == "more" else []

    def add_damping(self, rule: Damping) -> keras.Variable:
        """The variable of a damping: a scalar, or a pair."""
        initial = lambda shape, dtype: tf.constant(rule.initial, dtype)  # noqa: E731
        shape = (rule.numbers,) if hasattr(rule, "numbers") else ()
        return self.add_variable(shape, initializer=initial, name="damping", aggregation="none")

    def direction(self, lin: Linearization) -> Vector:
        """The accepted step, or zero."""
        require_convex(lin.gauss_newton(), "GaussNewton", "Choose another loss.")
        model = local_models.made(lin, self.solver, self.memory, self._undamped, self.scaling)
        self.solved_by = model.solved_by
        scale, state = self._scale(model, lin), tf.identity(self._damping.value)
        if hasattr(self._rule, "begun"):
            state = self._rule.begun(state, model.largest(scale, known=state[0] > 0))
        one, nan = tf.ones([], trees.scalar_dtype(lin.weights)), tf.constant(float("nan"), tf.float64)
        tried = first_taken(
            lambda state: self._tried(lin, model, scale, state), state, lin.weights,
            self.attempts if self._trial.looks else 1,
            damping=_first(state), reduction_ratio=nan, cg_iterations=tf.constant(0.0), step_length=one,
        )  # fmt: skip
        self.remember(self._damping, tried.next)
        if self.momentum:
            self.remember(self._last, trees.where(tried.taken, tried.step, trees.zeros_like(tried.step)))
        self.reject(tf.logical_not(tried.taken))
        self.report(**tried.reports)
        # products that are not finite skip the step: no damping helps
        return trees.nan_unless(tried.finite, tried.step)

    def _tried(self, lin, model, scale, state):
        """A step with one damping, and whether to take it."""
        damping = _first(state)
        model.decompose(damping, scale)
        d = model.solve(trees.scale(self.momentum, trees.values(self._last)) if self.momentum else None)
        path = [d]
        while len(path) < self.order:
            path.append(model.acceleration(path))
        finite, solved = model.is_finite() & tf.math.is_finite(lin.loss), trees.is_finite(d)
        path[0] = trees.where(solved, d, trees.zeros_like(d))  # with more damping it may be
        step, length, loss, straight = self._searched(lin, model, path, scale)

        rate = tf.cast(self.learning_rate, trees.scalar_dtype(step))
        checked = self._trial.check(
            self.iterations, state, before=lin.loss, after=lambda: tf.where(straight, loss(rate), float("inf")),
            # of the straight step in full, so that where a search had to shorten it the damping grows
            predicted=lambda: model.change(rate),
        )  # fmt: skip
        taken = checked.accepted & solved & (length > 0)
        reports = {
            "damping": damping, "reduction_ratio": checked.ratio,
            "cg_iterations": tf.cast(model.iterations(), tf.float32),
            "step_length": tf.where(taken, length, tf.zeros_like(length)),
        }  # fmt: skip
        return Attempt(step, taken, finite, checked.value, reports)

    def linear_step(self) -> NotLinear:
        """None: each step solves anew."""
        return NotLinear(
            "`GaussNewton` solves for the minimum of a quadratic model of each batch: it takes curvature into account, "
            "however large. Watch its `reduction_ratio` and `damping`."
        )

    @property
    def order(self) -> int:
        """The order of the path of a step: 1 for a straight one, 2 with the geodesic acceleration."""
        return int(self.geodesic) + 1 if isinstance(self.geodesic, bool) else self.geodesic

    @property
    def _undamped(self):
        return self._rule.every is None and self._rule.initial == 0.0

    def _scale(self, model, lin):
        """`D`, a vector of positive tensors; `None` for the identity."""
        if self.scaling == "identity":
            return None
        norms = model.column_norms()
        if self._norms:
            norms = [tf.maximum(a, b) for a, b in zip(norms, trees.values(self._norms))]
            self.remember(self._norms, norms)
        return scale_of(norms)

    def _searched(self, lin, model, path, scale):
        """`(step, length, loss, straight)`: the step, how far along the path, a function from a multiple of the step to
        the loss, and whether the path is straight enough."""
        one = tf.ones([], trees.scalar_dtype(path[0]))
        if self.line_search is None:
            step, straight = self._bent(path, scale)
            return step, one, lambda rate: lin.loss_at(trees.scale(rate, step)), straight
        known = trees.is_finite([a for v in path[1:] for a in v]) if path[1:] else True
        path = [path[0], *(trees.where(known, v, trees.zeros_like(v)) for v in path[1:])]
        rate = tf.cast(self.learning_rate, one.dtype)
        along = lambda s: lin.loss_at(trees.scale(rate, trees.along(path, tf.cast(s, one.dtype))))  # noqa: E731
        length, loss = self.line_search.search(along, lin.loss, rate * model.slope(path[0]), along(one))
        length = tf.cast(length, one.dtype)
        return trees.along(path, length), length, lambda rate: loss, tf.constant(True)

    def _bent(self, path, scale):
        """The end of the path and true, or `d` and false where the path bends too much."""
        d, bends = path[0], list(enumerate(path[1:], 2))
        if not bends:
            return d, tf.constant(True)
        length = lambda v: trees.norm(v if scale is None else [s * b for s, b in zip(scale, v)])  # noqa: E731
        terms = [4.0 / math.factorial(k) * length(v) for k, v in bends]
        small = tf.reduce_all([term <= LARGEST_BEND * length(d) for term in terms])  # false for NaN
        return trees.where(small, trees.along(path, 1.0), d), small


def _first(state):
    """The damping in the state of a rule, which may be a pair."""
    return state[0] if state.shape.rank else state
