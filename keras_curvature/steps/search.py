"""One search along a line: the loop that every search for a step length shares.

A search looks at the loss along a direction, `phi(s) = f(w + s d)`, and asks for one length after the other. A rule
(`ArmijoLineSearch`, `StrongWolfe`, `HagerZhang`) decides from scalars alone, as a state machine: `begin` gives the
first `State`, `advance` the next one from the `Point` that was asked for. So the loop below evaluates loss and gradient
in one place, and a graph holds the network once, however many cases a rule has. The gradient of the point that the rule
would return so far travels along, so that the step after the search need not compute it again.

A point whose loss or gradient is not finite becomes a point of infinite loss: every rule steps back from it. Scalars
are in float64, also for losses in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.typing import Scalar, Vector

# How a search ended, `Found.end`. Reports show the number.
SEARCHING, CONDITIONS_MET, BUDGET, INTERVAL, NO_SLOPE = range(5)
ENDS = {
    SEARCHING: "no search",
    CONDITIONS_MET: "the conditions of the search are met",
    BUDGET: "the evaluations are used up",
    INTERVAL: "the interval is as small as rounding",
    NO_SLOPE: "the loss is flat along the direction",
}
# What to keep of the points seen so far, `State.keep`.
KEEP, TRIAL, START = range(3)


class Point(NamedTuple):
    """A point on the line; float64 scalars."""

    length: tf.Tensor
    loss: tf.Tensor
    slope: tf.Tensor


class State(NamedTuple):
    """The state of a search.

    Attributes:
        next: The length to look at next.
        keep: Which point to return so far: `KEEP` the last one, `TRIAL` the one just seen, `START` the start.
        end: `SEARCHING`, or how the search ended.
        memory: What the rule remembers, a nest of tensors.
        rounding: How inexact losses have proved to be, relatively: what earlier searches learnt and later ones begin
            with, a float64 scalar. `begin` may leave it out, a rule that does not learn it leaves it as it is.
    """

    next: tf.Tensor
    keep: tf.Tensor
    end: tf.Tensor
    memory: Any
    rounding: tf.Tensor | float = 0.0


class Search(Protocol):
    """What a component must have to be a search."""

    @property
    def max_evaluations(self) -> int:
        """Largest number of lengths to look at."""

    def begin(self, start: Point, first: tf.Tensor) -> State:
        """The state before the first evaluation; `first` is the length to begin with."""

    def advance(self, start: Point, state: State, trial: Point) -> State:
        """The state after `trial`, the point at `state.next`."""


class Found(NamedTuple):
    """The result of a search.

    Attributes:
        point: The point to go to; of length 0 if there is none.
        gradient: The gradient there, a vector.
        evaluations: Number of evaluations of loss and gradient, int32.
        overflows: How many of them were not finite, int32.
        end: How it ended, a key of `ENDS`, int32.
        rounding: What the next search is to begin with, see `State`.
    """

    point: Point
    gradient: Vector
    evaluations: tf.Tensor
    overflows: tf.Tensor
    end: tf.Tensor
    rounding: tf.Tensor


def search_along(
    rule: Search, along: Callable[[tf.Tensor], tuple[tf.Tensor, Vector]], direction: Vector, loss: Scalar,
    slope: Scalar, gradient: Vector, first: Scalar = 1.0, rounding: Scalar = 0.0,
) -> Found:  # fmt: skip
    """Search along `direction` by a rule.

    Args:
        rule: A `Search`.
        along: Function from a length `s`, a float64 scalar, to the loss and the gradient at `w + s d`.
        direction: `d`, a vector.
        loss: `f(w)`.
        slope: `g'd`. Without a negative slope nothing is evaluated.
        gradient: `g`, a vector.
        first: The length to begin with. Defaults to `1.0`.
        rounding: What the last search along another line found, see `State`. Defaults to `0.0`.

    Returns:
        A `Found`.
    """
    start = Point(tf.zeros((), tf.float64), tf.cast(loss, tf.float64), tf.cast(slope, tf.float64))
    state = rule.begin(start, trees.exactly(first, tf.float64))
    descends = start.slope < 0  # false for a NaN
    end = tf.where(descends, state.end, NO_SLOPE)
    state = state._replace(end=end, rounding=trees.exactly(rounding, tf.float64))

    def look(evaluations, overflows, state, kept, kept_gradient):
        trial, found = _evaluate(along, direction, state.next)
        state = rule.advance(start, state, trial)
        overflows += tf.cast(tf.math.is_inf(trial.loss), tf.int32)
        takes, returns = tf.equal(state.keep, TRIAL), tf.equal(state.keep, START)
        # conditions, because `tf.where` would copy the vectors
        branches = [lambda: list(kept_gradient), lambda: list(found), lambda: list(gradient)]
        kept_gradient = switch(state.keep, branches)  # of `KEEP, TRIAL, START`
        return evaluations + 1, overflows, state, pick(takes, trial, pick(returns, start, kept)), kept_gradient

    def goes_on(evaluations, overflows, state, kept, kept_gradient):
        return tf.equal(state.end, SEARCHING) & (evaluations < rule.max_evaluations)

    evaluations, overflows, state, kept, kept_gradient = tf.while_loop(
        goes_on, look, (tf.constant(0), tf.constant(0), state, start, list(gradient)), parallel_iterations=1
    )
    end = tf.where(tf.equal(state.end, SEARCHING), BUDGET, state.end)
    serves = tf.equal(end, CONDITIONS_MET) | (kept.loss < start.loss)  # without the conditions, a lower loss at least
    kept_gradient = tf.cond(serves, lambda: list(kept_gradient), lambda: list(gradient))
    return Found(pick(serves, kept, start), kept_gradient, evaluations, overflows, end, state.rounding)


class OneLength:
    """The rule that takes the first length if its loss is finite: no search."""

    max_evaluations = 1

    def begin(self, start: Point, first: tf.Tensor) -> State:
        """The state before the evaluation."""
        return State(first, tf.constant(KEEP), tf.constant(SEARCHING), ())

    def advance(self, start: Point, state: State, trial: Point) -> State:
        """The state after it."""
        finite = tf.math.is_finite(trial.loss)
        return state._replace(keep=tf.where(finite, TRIAL, KEEP), end=tf.where(finite, CONDITIONS_MET, SEARCHING))


def switch(index: tf.Tensor, branches: Sequence[Callable[[], Any]]) -> Any:
    """`branches[index]()`, by conditions.

    XLA tries to know the index of `tf.switch_case` in advance, and where it comes from the gradient of a pooling layer
    logs a page of errors.
    """
    first, *others = branches
    if not others:
        return first()
    return tf.cond(tf.equal(index, 0), first, lambda: switch(index - 1, others))


def pick(condition, first, second):
    """`tf.where(condition, first, second)` for nests of tensors."""
    return tf.nest.map_structure(lambda a, b: tf.where(condition, a, b), first, second)


def _evaluate(along, direction, length):
    """`(Point, gradient)` at a length; a point of infinite loss and zero slope where anything is not finite."""
    loss, gradient = along(length)
    loss, slope = tf.cast(loss, tf.float64), tf.cast(trees.dot(gradient, direction), tf.float64)
    finite = tf.math.is_finite(loss) & tf.math.is_finite(slope) & trees.is_finite(gradient)
    infinite = tf.constant(float("inf"), tf.float64)
    return Point(length, tf.where(finite, loss, infinite), tf.where(finite, slope, tf.zeros_like(slope))), gradient
