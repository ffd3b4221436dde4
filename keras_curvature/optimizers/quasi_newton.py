"""What all quasi-Newton methods share: descend along `-H g`, search for a length, learn from the two gradients.

The inverse Hessian `H` is learnt from pairs

    s = the step,    y = the difference of the gradients at its two ends, on the same batch

The search has computed the gradient at the far end, so a pair costs nothing more, and batches may change from step to
step. If the next step begins at the very weights where this one ended, on the same batch by its fingerprint
(`linearization/pure/fingerprint.py`) and with the same loss, the gradient is used again there. Training with the whole
set as the batch then costs one evaluation of loss and gradient for each length that the search looks at, and a forward
pass for Keras' logs. The loss alone would not do: before an output layer of zeros has moved, it is `log(classes)` on
every batch; and the batch alone not either, because of dropout masks.
"""

from typing import Any, Literal, NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_component, is_number
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure.fingerprint import fingerprint
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.steps.search import OneLength, Search, pick, search_along
from keras_curvature.typing import LearningRate, Variables, Vector

# Smallest `s'y / (|g| |s|^2)` of a pair that is kept (Li and Fukushima 2001), and Powell's constants.
CAUTION, POWELL = 1e-6, 0.2
# How far two losses of one batch may differ by rounding, relatively.
SAME_LOSS = {tf.float64: 1e-12, tf.float32: 2e-6}


class Pair(NamedTuple):
    """What a step teaches; scalars are float64.

    Attributes:
        s: The step, a vector.
        y: The difference of the gradients, a vector.
        sy: `s'y`.
        yy: `y'y`.
        sBs: `s'B s` for `B = H^-1` before the step: no product, because `B s = -length * g`.
        learns: Whether to learn from the pair.
        gradient: The gradient at the end of the step, a vector.
        sg: `s'gradient`.
        of_end: The factor of `gradient` in `y`: 1, or less of a damped pair.
        of_begin: The factor of the gradient at the begin of the step in `y`: -1, or another of a damped pair.
        decrease: How much lower the loss is after the step.
    """

    s: Vector
    y: Vector
    sy: tf.Tensor
    yy: tf.Tensor
    sBs: tf.Tensor
    learns: tf.Tensor
    gradient: Vector
    sg: tf.Tensor
    of_end: tf.Tensor
    of_begin: tf.Tensor
    decrease: tf.Tensor


class QuasiNewton(CurvatureOptimizer):
    """Base of `LBFGS` and `BFGS`; see the module. A subclass keeps `H` and writes `descent` and `learn`.

    Where `-H g` does not descend, `H` is forgotten and the step is along `-g`; after a search that found no lower
    point, the next step is.

    Args:
        learning_rate: Multiple of the step that the search found; without a search the length.
        search: A search, or `None`.
        update: `"cautious"` or `"damped"`.
        initial_scale: `H` before the first pair, a number; `None`: `min(1, 1/|g|)`.
        **kwargs: See `CurvatureOptimizer`.
    """

    needs = Needs()
    later = ("batch", "rounding")
    reports = {
        "evaluations": "sum", "step_length": "mean", "pairs": "last", "curvature": "last", "gradient_max": "last",
        "search_end": "last", "resets": "sum", "overflows": "sum", "step_norm": "mean", "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate, search: Search | None, update: Literal["cautious", "damped"],
        initial_scale: float | None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, **kwargs)
        self.search, self.update, self.initial_scale = search, update, initial_scale
        if search is not None:
            check_component(self, "search", search, "advance", "HagerZhang()")
        check_choice(self, "update", update, ("cautious", "damped"))
        if initial_scale is not None:
            valid = is_number(initial_scale) and initial_scale > 0
            check(self, "initial_scale", initial_scale, valid, "a number above 0, or None")

    # A method implements these.

    def products(self, gradient: Vector) -> list[tf.Tensor]:
        """The products of a gradient with what is remembered, which `descent` and `learn` are given."""
        return []

    def descent(self, gradient: Vector, products: list[tf.Tensor], count: tf.Tensor, scale: tf.Tensor) -> Vector:
        """`-H g`, from `count` pairs so far; `-scale * g` without any."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `descent`.")

    def learn(self, pair: Pair, products: list[tf.Tensor], count: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        """Remember the next `H`: as it is where `pair.learns` is false; the products of `pair.gradient` with it."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `learn`.")

    def first_length(self, slope: tf.Tensor) -> tf.Tensor:
        """The length that a search looks at first, a float64 scalar."""
        return tf.ones((), tf.float64)

    def kept(self, count: tf.Tensor) -> tf.Tensor:
        """How many of `count` pairs `H` still knows."""
        return count

    def create_state(self, variables: Variables) -> None:
        """The number of pairs; the last end point, its loss, batch and gradient, and the `products` of that.

        And `rounding`, what the searches learnt.
        """
        self._count = self.add_variable((), initializer="zeros", dtype="int32", name="pairs", aggregation="none")
        self._end = self.add_optimizer_variables(variables, "end")
        self._gradient = self.add_optimizer_variables(variables, "gradient")
        self._loss = self.add_scalar(float("nan"), "loss")
        self._batch = self.add_variable((), dtype="int32", name="batch", aggregation="none")
        self._rounding = self.add_scalar(0.0, "rounding")
        self._products = []

    # The step.

    def direction(self, lin: Linearization) -> Vector:
        """The step that the search found along `-H g`."""
        w, (g, products) = lin.weights, self._gradient_of(lin)
        norm = tf.cast(trees.norm(g), tf.float64)
        scale = self._first_scale(norm)
        d, dd, slope, count, reset = self._descent(g, products, norm, scale)
        found = self._look(lin, d, slope, g)
        accepted = found.point.length > 0
        step = trees.scale(found.point.length, d)

        pair = self._pair(step, g, slope, norm, found, dd, lin.loss)
        after = self.learn(pair, products, count, scale)
        stuck = ~accepted & (norm > 0)
        self.remember(self._count, tf.where(stuck, 0, count + tf.cast(pair.learns, count.dtype)))
        self.remember(self._end, trees.add(w, step))  # where no length is accepted, the step is zero
        self.remember(self._gradient, found.gradient)
        self.remember(self._products, after)
        self.remember(self._loss, found.point.loss)
        self.remember(self._rounding, found.rounding)
        self.reject(~accepted)
        self._tell(found, pair, count, reset | stuck, dd, norm)
        return d if self.search is None else step  # without a search Keras multiplies by the length

    def _gradient_of(self, lin):
        """The gradient and its products; those of the last end point if weights, batch and loss are the same."""
        loss, batch = lin.loss, lin.total(lambda pure, weights: fingerprint(pure.batch))
        last = tf.cast(self._loss.value, loss.dtype)
        same = tf.abs(loss - last) <= SAME_LOSS.get(loss.dtype, SAME_LOSS[tf.float32]) * tf.abs(last)
        same &= tf.equal(batch, self._batch.value)
        self.remember(self._batch, batch)
        for here, end in zip(lin.weights, trees.values(self._end)):
            same &= tf.reduce_all(tf.equal(here, end))

        def anew():
            gradient = _full_precision(lin.gradient)
            return gradient, self.products(gradient)

        def known():
            return trees.values(self._gradient), [tf.identity(v.value) for v in self._products]

        gradient, products = tf.cond(same, known, anew)
        lin.take_gradient(gradient)
        return gradient, products

    def _first_scale(self, norm):
        """`H` before the first pair, a float64 scalar."""
        if self.initial_scale is not None:
            return tf.constant(self.initial_scale, tf.float64)
        return tf.where(norm > 1.0, 1.0 / norm, 1.0)

    def _descent(self, g, products, norm, scale):
        """`(direction, its squared norm, slope, count of pairs, whether H was forgotten)`."""
        count = tf.identity(self._count.value)
        d = self.descent(g, products, count, scale)
        slope, dd = tf.cast(trees.dot(g, d), tf.float64), tf.cast(trees.squared_norm(d), tf.float64)
        descends = (slope < 0) & tf.math.is_finite(dd)
        # conditions, because `tf.where` would copy the vectors
        d = tf.cond(descends, lambda: d, lambda: trees.scale(-scale, g))
        dd, slope, count = pick(descends, (dd, slope, count), ((scale * norm) ** 2, -scale * norm**2, 0))
        return d, dd, slope, count, ~descends & (norm > 0)

    def _look(self, lin, d, slope, g):
        """What the search found; without a search, the point at the learning rate if it is finite."""

        def along(length):
            loss, gradient = lin.loss_and_gradient_at(trees.scale(length, d))
            return loss, _full_precision(gradient)

        # from a loss that is not finite no search begins, and the step is skipped
        slope = tf.where(tf.math.is_finite(lin.loss), slope, float("nan"))
        if self.search is None:
            rule, first = OneLength(), tf.cast(self.learning_rate, tf.float64)
        else:
            rule, first = self.search, self.first_length(slope)
        return search_along(rule, along, d, lin.loss, slope, g, first, self._rounding.value)

    def _pair(self, s, g, slope, norm, found, dd, loss):
        """The `Pair` of a step."""
        y, length = trees.subtract(found.gradient, g), found.point.length
        sy, ss, sBs = tf.cast(trees.dot(s, y), tf.float64), length**2 * dd, -(length**2) * slope
        theta = tf.ones((), tf.float64)
        if self.update == "damped":
            short = sy < POWELL * sBs
            theta = tf.where(short, (1.0 - POWELL) * sBs / tf.where(short, sBs - sy, 1.0), 1.0)
            y = trees.add(trees.scale(theta, y), trees.scale(-length * (1.0 - theta), g))
            sy = theta * sy + (1.0 - theta) * sBs
        yy = tf.cast(trees.squared_norm(y), tf.float64)
        curved = (sy >= CAUTION * norm * ss) if self.update == "cautious" else (sy > 0)
        learns = (length > 0) & curved & (sy > 0) & tf.math.is_finite(sy) & tf.math.is_finite(yy)
        of_begin = -theta - length * (1.0 - theta)
        decrease = tf.cast(loss, tf.float64) - found.point.loss
        return Pair(s, y, sy, yy, sBs, learns, found.gradient, length * found.point.slope, theta, of_begin, decrease)

    def _tell(self, found, pair, count, reset, dd, norm):
        length = found.point.length
        ss = length**2 * dd
        taken = tf.sqrt(dd if self.search is None else ss)
        self.report(
            evaluations=found.evaluations, step_length=length, pairs=self.kept(count),
            curvature=tf.where(ss > 0, pair.sy / tf.where(ss > 0, ss, 1.0), float("nan")),
            gradient_max=trees.largest(found.gradient), search_end=found.end, resets=tf.cast(reset, tf.float32),
            # a gradient that is not finite skips the step
            overflows=found.overflows, step_norm=tf.where(tf.math.is_finite(norm), taken, float("nan")),
        )  # fmt: skip

    def linear_step(self) -> NotLinear:
        """None: each step tests its length on the loss."""
        return NotLinear(
            f"`{type(self).__name__}` learns the curvature from gradients and searches for the length of each step: it "
            "takes curvature into account, however large. Watch its `search_end` and `step_length`."
        )


def _full_precision(vector):
    return [trees.full_precision(a) for a in vector]
