"""Natural gradient descent with the whole Fisher matrix: no blocks, no factors."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_number, check_part, register
from keras_curvature.linearization.jacobian.rows import FisherRows
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function
from keras_curvature.optimizers import local_models
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.held_data import HeldData
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.optimizers.matrix_model import WithMatrix
from keras_curvature.solvers import ConjugateGradient, dense
from keras_curvature.steps import Damping, LevenbergMarquardt, Trial, as_damping
from keras_curvature.typing import Fisher, LearningRate, Variables, Vector


@register
class NaturalGradient(CurvatureOptimizer):
    """Natural gradient descent: the steepest descent in the distance between the predictions.

        d = -(F + lambda I)^-1 g,        F = S'S the Fisher matrix, one row of S for each example (and label)
        F^-1 by rows:  d = -(g - S'(lambda I + S S')^-1 S g) / lambda

    For models whose Fisher matrix K-FAC approximates too coarsely, and for small batches, where solving in rows is
    cheap: the matrix `S S'` is formed layer by layer. The loss must be the negative logarithm of a known likelihood,
    unless `fisher="empirical"`.

    References: Amari, "Natural gradient works efficiently in learning" (1998); Ren and Goldfarb, "Efficient subsampled
    Gauss-Newton and natural gradient methods for training neural networks" (2019), Algorithm 1, for the solution in
    rows and the damping; Amari, Park and Fukumizu, "Adaptive method of realizing natural gradient learning for
    multilayer perceptrons" (2000), for the running average; Pascanu and Bengio, "Revisiting natural gradient for deep
    networks" (2014), for the metric from other data. Differences: (1) the Gram matrix `S S'` is formed layer by layer,
    also with convolutions and recurrent layers; (2) Amari, Park and Fukumizu update the inverse, in which the damping
    fades and directions without examples grow without bound; `decay` averages the matrix and decomposes it in each
    step; (3) L2 regularizers are added to `F`; (4) with an adaptive damping every step is checked, by one more forward
    pass, and one that raises the loss of its own batch is not taken.

    Args:
        learning_rate: Multiple of the step. Defaults to `1.0`.
        fisher: `"exact"`: over all possible labels, which needs as many rows; `"sampled"`: labels drawn from the model;
            `"empirical"`: the true labels. Defaults to `"sampled"` (Martens).
        damping: A number, or a component. Defaults to `LevenbergMarquardt.martens(initial=1.0)` (Ren and Goldfarb).
        solver: `"rows"`, `"weights"`, `"qr"`, `"svd"`, a `ConjugateGradient`, or `"auto"`, as in `GaussNewton`.
            Defaults to `"auto"`.
        curvature_batch: The part of the batch, or of `metric_data`, that the Fisher matrix is computed from: a share in
            (0, 1] or a number of examples. Defaults to `None`, all of it.
        decay: Share of the old matrix in a running average of Fisher matrices, in [0, 1). It keeps a matrix `(n, n)`
            for `n` weights, so it is for small models. Defaults to `0.0`: no average.
        memory: The most bytes that rows may take. Defaults to `2**31`.
        metric_data: Other inputs to compute the Fisher matrix from, with labels drawn from the model: an array, or a
            list or dictionary of arrays as the model takes them. With `curvature_batch` each step takes the next of
            these inputs, in turn. The optimizer's state holds and saves them; a config holds their shapes alone. The
            drawn targets get the shape of the batch's targets, and sequences its padding. The loss must be a mean over
            the examples. Defaults to `None`: the inputs of the batch.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping`, `reduction_ratio`, `cg_iterations` (0 without conjugate gradients), `step_norm`,
    `skipped_steps`.

    Raises:
        ValueError: When it is built, with `decay`: the matrices would need more than 8 GB. At a step: the optimizer was
            made from a config, and its `metric_data` was not loaded.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.NaturalGradient(), loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=128)
    ```
    """

    needs = Needs(products=True, gram=True)
    reports = {
        "damping": "last", "reduction_ratio": "mean", "cg_iterations": "mean", "step_norm": "mean",
        "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, fisher: Fisher = "sampled",
        damping: float | Damping = LevenbergMarquardt.martens(initial=1.0),
        solver: Literal["auto", "rows", "weights", "qr", "svd"] | ConjugateGradient = "auto",
        curvature_batch: float | None = None, decay: float = 0.0, memory: int = 2**31, metric_data: Any = None,
        name: str = "natural_gradient", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.fisher, self.damping, self.solver = fisher, damping, solver
        self.curvature_batch, self.decay, self.memory = curvature_batch, decay, memory
        kinds = ("sampled", "exact", "empirical")
        check_choice(self, "fisher", fisher, kinds)
        self._rule = as_damping(self, damping)
        self._trial = Trial(self._rule, accepts="lower", always=bool(self._rule.every))
        valid = self._rule.every is not None or self._rule.initial > 0
        check(self, "damping", damping, valid, "positive: without damping the matrix may be singular")
        if not isinstance(solver, ConjugateGradient):
            check_choice(self, "solver", solver, ("auto", *local_models.WAYS), local_models.EXPECTED)
        check_part(self, "curvature_batch", curvature_batch)
        check_number(self, "decay", decay, low=0, high=1, open_high=True)
        check(self, "decay", decay, not decay or solver == "auto", '0.0, but for `solver="auto"`')
        check_number(self, "memory", memory, low=0, open_low=True)
        self._metric_data = HeldData(self, "metric_data", metric_data, curvature_batch)
        self.metric_data = self._metric_data.described
        labelled = metric_data is None or fisher != "empirical"
        check(self, "fisher", fisher, labelled, '"sampled" or "exact" with `metric_data`, which has no labels')

    def create_state(self, variables: Variables) -> None:
        """The damping, and with `decay` the matrix."""
        self._damping, self._average, n = self.add_scalar(self._rule.initial, "damping"), None, trees.count(variables)
        self._metric_data.create(self)
        if self.decay:
            dense.check_size(self, variables, "Use `decay=0.0`.")
            self._average = self.add_variable((n, n), dtype="float64", name="fisher", aggregation="none")

    def direction(self, lin: Linearization) -> Vector:
        """The step."""
        damping, model = tf.identity(self._damping.value), self._local_model(lin)
        model.decompose(damping, None)
        d = model.solve()
        finite, rate = model.is_finite() & tf.math.is_finite(lin.loss), tf.cast(self.learning_rate, lin.loss.dtype)
        checked = self._trial.check(
            self.iterations, damping, before=lin.loss, after=lambda: lin.loss_at(trees.scale(rate, d)),
            predicted=lambda: model.change(tf.cast(rate, trees.scalar_dtype(d))),
        )  # fmt: skip
        self.remember(self._damping, checked.value)
        self.reject(tf.logical_not(checked.accepted))
        self.report(damping=damping, reduction_ratio=checked.ratio, cg_iterations=model.iterations())
        return trees.nan_unless(finite, trees.where(checked.accepted, d, trees.zeros_like(d)))

    def linear_step(self) -> NotLinear:
        """None: each step solves anew."""
        return NotLinear(
            "`NaturalGradient` divides by the curvature of each batch: it takes curvature into account, however large. "
            "Watch its `reduction_ratio` and `damping`."
        )

    def _batch_of_the_metric(self, lin):
        if self.metric_data is not None:
            return lin.again(batch=self._metric_data.batch(self, lin))
        return lin if self.curvature_batch is None else lin.chunk(self.curvature_batch, self.iterations)

    def _local_model(self, lin):
        """The local model with the Fisher matrix for its curvature."""
        batch = self._batch_of_the_metric(lin)
        rows = FisherRows(batch, self.fisher, tf.cast(self.iterations, tf.int32), self.memory, lin.gradient)
        if self._average is not None:
            S, last = tf.cast(rows.dense(), tf.float64), tf.identity(self._average.value)
            F = tf.matmul(S, S, transpose_a=True)
            F = tf.where(tf.reduce_any(last != 0), self.decay * last + (1.0 - self.decay) * F, F)
            self.remember(self._average, F)
            return WithMatrix(lin, F)

        def product(v):
            return [a + trees.exactly(c, b.dtype) * b for a, c, b in zip(rows.transposed(rows @ v), lin.l2, v)]

        operator = lambda: Function(product, psd=True)  # noqa: E731
        return local_models.made(lin, self.solver, self.memory, False, "identity", rows, operator)
