"""PSGD: a preconditioner fitted by stochastic descent, one step per update."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import (
    check,
    check_choice,
    check_component,
    check_count,
    check_number,
    is_number,
    register,
)
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function
from keras_curvature.optimizers.arguments import with_needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import LinearStep, averaged, steps_taken
from keras_curvature.solvers.kronecker_geometry import KroneckerGeometry
from keras_curvature.solvers.low_rank import LowRankGeometry
from keras_curvature.solvers.whitening import Draws, Geometry
from keras_curvature.typing import LearningRate, Variables, Vector

GEOMETRIES = {"kronecker": KroneckerGeometry, "low_rank": LowRankGeometry}
# The reference's learning rate, and its bounds on the mean and on the largest entry of a step.
KINDS = {"whitening": (0.001, (2.0, 10.0)), "momentum": (0.001, (2.0, 10.0)), "newton": (0.01, None)}


@register
class PSGD(CurvatureOptimizer):
    """PSGD: the gradient times a matrix `P`, which stochastic descent fits.

        P = Q'Q  minimizes  E[h'P h + v'P^-1 v],   v ~ N(0, I)            one relative step per update
        w  <- w - learning_rate * clip(P m)                               m: the gradient's moving average

    With `h = g` (`kind="whitening"`) `P` tends to `(E g g')^-1/2`, from gradients alone, on any model. With `h = H v`
    (`kind="newton"`) it tends to `|H|^-1`, also where `H` is indefinite, for one Hessian product per refresh; this
    takes a curved model. `geometry` chooses the family of `Q`: a factor for each axis of each weight, or a diagonal and
    a few outer products over all weights. No matrix larger than the rank is inverted.

    Reference: Li, "Preconditioned stochastic gradient descent" (arXiv:1512.04202), "Black box Lie group
    preconditioners for SGD" (arXiv:2211.04422), "Stochastic Hessian fittings with Lie groups" (arXiv:2402.11858), and
    the author's psgd_torch: `KronWhiten, KronNewton, LRAWhiten, LRANewton`. Differences from that code: (1) the
    preconditioner is fitted every so many steps, not with a probability; (2) a fit that fails keeps the last one;
    (3) a pair with `h = 0`, from a batch without weight, is skipped: as a first pair it would make `P` as large as
    `1 / damping`; (4) the differences of `LowRankGeometry`.

    Args:
        learning_rate: Defaults to `None`: `0.001` for the two whitening kinds, `0.01` for `"newton"` (the reference).
        geometry: `"kronecker"`, `"low_rank"`, or a component with the options of the fit, such as
            `KroneckerGeometry(rate=0.05)`, `LowRankGeometry(rank=20)`. Defaults to `"kronecker"`.
        kind: `"whitening"` (of the gradient), `"momentum"` (whitening of its moving average, for sparse gradients;
            divide the learning rate by `sqrt((1 + momentum) / (1 - momentum))`), `"newton"`. Defaults to `"whitening"`.
        momentum: Decay of the moving average, in [0, 1); the first steps average evenly. Defaults to `0.0` (the
            reference).
        every: Steps from one fit of the preconditioner to the next. Defaults to `1`.
        clip: `(mean, entry)`, two bounds on the preconditioned gradient: its root mean square is scaled down to `mean`,
            per weight or, with low rank, over all weights, and each entry is clipped to `entry`. `None`: no bounds.
            `"auto"`: `(2.0, 10.0)` for the whitening kinds, whose steps are about 1, and `None` for `"newton"` (the
            reference), which can use Keras' `global_clipnorm`. Defaults to `"auto"`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (tensors of the state whose fit failed), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.PSGD(), loss="mse")

    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.PSGD(geometry="low_rank", kind="newton"), loss="mse")
    ```
    """

    reports = {"failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}
    needs = Needs(only_gradients=True)

    def __init__(
        self, learning_rate: LearningRate | None = None,
        geometry: Literal["kronecker", "low_rank"] | Geometry = "kronecker",
        kind: Literal["whitening", "momentum", "newton"] = "whitening", momentum: float = 0.0, every: int = 1,
        clip: tuple[float, float] | list[float] | Literal["auto"] | None = "auto", name: str = "psgd", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_choice(self, "kind", kind, tuple(KINDS))
        rate, bounds = KINDS[kind]
        needs = Needs(hessian=True) if kind == "newton" else type(self).needs
        super().__init__(rate if learning_rate is None else learning_rate, name=name, **with_needs(kwargs, needs))
        self.geometry, self.kind, self.momentum, self.every = geometry, kind, momentum, every
        self.clip = list(clip) if isinstance(clip, tuple) else clip  # as a file gives it back
        self._clip = bounds if isinstance(clip, str) and clip == "auto" else self._checked(self.clip)
        self._geometry = self._as_geometry(geometry)
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True)
        check(self, "momentum", momentum, momentum > 0 or kind != "momentum", 'more than 0 with `kind="momentum"`')
        check_count(self, "every", every)

    def _as_geometry(self, geometry):
        if isinstance(geometry, str):
            check_choice(self, "geometry", geometry, GEOMETRIES, f"one of {tuple(GEOMETRIES)} or a component")
            return GEOMETRIES[geometry]()
        check_component(self, "geometry", geometry, "fit", "LowRankGeometry(rank=20)")
        return geometry

    def _checked(self, clip):
        valid = clip is None or (
            isinstance(clip, (list, tuple)) and len(clip) == 2 and all(is_number(c) and c > 0 for c in clip)
        )
        check(self, "clip", clip, valid, '`"auto"`, `None`, or two positive numbers such as `(2.0, 10.0)`')
        return clip

    def create_state(self, variables: Variables) -> None:
        """The moving average, and the preconditioner."""
        self._m = self.add_optimizer_variables(variables, "m") if self.momentum else []
        dtype = trees.scalar_dtype(variables).name
        self._fitted = [
            self.add_variable(shape, initializer=initial, dtype=dtype, name=name, aggregation="none")
            for name, shape, initial in self._geometry.specs(_shapes(variables))
        ]

    def precondition(self, gradients: Vector) -> Vector:
        """The whitening kinds."""
        m, draws = self._averaged(gradients), Draws(self.iterations)
        h = m if self.kind == "momentum" else gradients
        return self._step(m, lambda state: self._geometry.fit(state, None, self._cast(h), draws))

    def direction(self, lin: Linearization) -> Vector:
        """The Newton type."""
        m, draws = self._averaged(lin.gradient), Draws(self.iterations)

        def fit(state):
            v = draws.normal_like(lin.gradient)
            return self._geometry.fit(state, self._cast(v), self._cast(lin.hessian() @ v), draws)

        return self._step(m, fit)

    def _step(self, m, fit):
        """Refresh the preconditioner, and apply it."""
        state = trees.values(self._fitted)
        state = self.refresh(self._fitted, self.every, lambda: fit(state))
        P = self._geometry.operator(state, _shapes(m))
        step = trees.negative(P @ self._cast(m))
        if self._clip is not None:
            step = _clipped(self._geometry.groups(step), *self._clip)
        return _with_empty(step, m)

    def _averaged(self, gradients):
        """The next `m`; its decay grows from zero, so that the first steps average evenly."""
        if not self.momentum:
            return gradients
        beta = self._decay(tf.cast(self.iterations, trees.scalar_dtype(gradients)))
        m = trees.add(trees.scale(beta, trees.values(self._m)), gradients, 1 - beta)
        self.remember(self._m, m)
        return m

    def _decay(self, t):
        return tf.minimum(t / (1 + t), self.momentum)

    def linear_step(self) -> LinearStep:
        """An average of gradients, times the preconditioner of the last step."""
        last = tf.constant(max(steps_taken(self) - 1, 0), tf.float64)
        note = None if self._clip is None else "Where `clip` cuts a step, the gauge is an upper bound."
        return LinearStep(averaged(float(self._decay(last))), self._preconditioner, note)

    def _preconditioner(self):
        P = self._geometry.operator(trees.values(self._fitted), _shapes(self.trained))

        def product(vector):
            return [tf.cast(a, v.dtype) for a, v in zip(_with_empty(P @ self._cast(vector), vector), vector)]

        return Function(product, psd=True)

    def _cast(self, vector):
        """A vector in the dtype of the fit, without tensors that have no entry."""
        return [tf.cast(a, self._fitted[0].dtype) for a in vector if 0 not in a.shape]


def _clipped(groups, mean, entry):
    """The vector of some groups: of each the root mean square is at most `mean`, and no entry is above `entry`."""
    squares = tf.stack([trees.squared_norm(group) for group in groups])
    sizes = tf.sqrt(squares / tf.constant([trees.count(group) for group in groups], squares.dtype))
    scales = tf.unstack(tf.where(sizes > mean, mean / sizes, tf.ones_like(sizes)))
    scaled = [a for scale, group in zip(scales, groups) for a in trees.scale(scale, group)]
    low, high = tf.constant(-entry, scaled[0].dtype), tf.constant(entry, scaled[0].dtype)
    return [tf.clip_by_value(a, low, high) for a in scaled]


def _shapes(vector):
    """The shapes of the tensors with an entry: an empty weight has nothing to fit."""
    return [tuple(a.shape) for a in vector if 0 not in a.shape]


def _with_empty(step, like):
    """The tensors of `step`, and those of `like` that have no entry in their places."""
    rest = iter(step)
    return [a if 0 in a.shape else next(rest) for a in like]
