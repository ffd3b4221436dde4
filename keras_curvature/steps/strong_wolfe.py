"""The strong Wolfe conditions, by bracketing and zooming with cubic interpolation."""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_curvature.component import Component, check, check_count, check_number, register
from keras_curvature.steps.search import CONDITIONS_MET, INTERVAL, KEEP, SEARCHING, TRIAL, Point, State, pick

# Share of the interval that an interpolated length keeps from its ends, and the smallest width in units of rounding.
FROM_ENDS_CUBIC, FROM_ENDS_QUADRATIC, SMALLEST = 0.2, 0.1, 4 * 2.2e-16


class Memory(NamedTuple):
    """What the search remembers: the best end of the interval, the other end, a third point; and where it is."""

    low: Point
    high: Point
    third: Point
    zooming: tf.Tensor
    count: tf.Tensor  # points seen in this phase


@register
@dataclasses.dataclass(frozen=True)
class StrongWolfe(Component):
    """Line search for a length `s` with the strong Wolfe conditions.

        phi(s) <= phi(0) + decrease * s * phi'(0)      and      |phi'(s)| <= curvature * |phi'(0)|

    with `phi(s) = f(w + s d)`. The length doubles until an interval is bracketed; the interval shrinks to the minimum
    of a cubic through three points, else of a parabola, else by half. At the end of the budget the best point with the
    first condition is taken. In float32 the first condition is lost in rounding near a minimum: use `HagerZhang`.

    Reference: Nocedal and Wright, "Numerical Optimization" (2006), Algorithms 3.5 and 3.6; interpolation and constants
    as in SciPy's `line_search`. Differences: (1) one budget for all evaluations, and no failure where a lower point was
    found; (2) where the better end of the interval is the right one, the cubic's minimum must also keep 0.2 of the
    interval from its ends; SciPy lets it lie outside; (3) from a point whose loss is not finite the search goes back to
    a tenth of the interval.

    Args:
        decrease: Fraction of the first-order decrease that the loss must reach, in (0, 1). Defaults to `1e-4`.
        curvature: Share of the slope that may remain, in (`decrease`, 1). Defaults to `0.9`.
        max_evaluations: Largest number of evaluations of loss and gradient. Defaults to `25` (PyTorch's L-BFGS).

    Example: `LBFGS(search=StrongWolfe(curvature=0.1))`
    """

    decrease: float = 1e-4
    curvature: float = 0.9
    max_evaluations: int = 25

    def __post_init__(self):
        check_number(self, "decrease", self.decrease, low=0, high=1, open_low=True, open_high=True)
        check_number(self, "curvature", self.curvature, low=0, high=1, open_low=True, open_high=True)
        check(self, "curvature", self.curvature, self.curvature > self.decrease, f"above `decrease` ({self.decrease})")
        check_count(self, "max_evaluations", self.max_evaluations)

    def begin(self, start: Point, first: tf.Tensor) -> State:
        """The state before the first evaluation."""
        memory = Memory(start, start, start, tf.constant(False), tf.constant(0))
        return State(first, tf.constant(KEEP), tf.constant(SEARCHING), memory)

    def advance(self, start: Point, state: State, trial: Point) -> State:
        """The state after a trial."""
        memory = state.memory
        low, high, zooming = memory.low, memory.high, memory.zooming
        allowed = start.loss + self.decrease * trial.length * start.slope
        no_better = (trial.loss >= low.loss) & (zooming | (memory.count > 0))
        too_high = (trial.loss > allowed) | no_better
        found = ~too_high & (tf.abs(trial.slope) <= -self.curvature * start.slope)
        # a low point from which the loss falls towards the other end keeps that end
        beyond = tf.where(zooming, trial.slope * (high.length - low.length) >= 0, trial.slope >= 0)
        turns = ~too_high & beyond
        onward = ~too_high & ~beyond & ~zooming

        third = pick(zooming, pick(too_high | turns, high, low), start)
        high = pick(too_high, trial, pick(turns, low, high))
        low = pick(too_high, low, trial)
        count = tf.where(zooming | onward, memory.count + 1, 0)
        memory = Memory(low, high, third, zooming | ~onward, count)
        width = tf.abs(high.length - low.length)
        tiny = ~onward & (width <= SMALLEST * tf.maximum(low.length, high.length))
        length = tf.where(onward, 2.0 * trial.length, _interpolate(memory))
        end = tf.where(found, CONDITIONS_MET, tf.where(tiny, INTERVAL, SEARCHING))
        return state._replace(next=length, keep=tf.where(too_high, KEEP, TRIAL), end=end, memory=memory)


def _interpolate(memory):
    """The next length between the ends of the interval."""
    low, high = memory.low, memory.high
    span = high.length - low.length  # negative where the better end is the right one

    def inside(length, share):
        place = (length - low.length) / span
        return (place >= share) & (place <= 1.0 - share)  # false for a NaN

    parabola, cubic = _minimum_of_parabola(low, high), _minimum_of_cubic(low, high, memory.third)
    half = low.length + 0.5 * span
    length = tf.where(inside(parabola, FROM_ENDS_QUADRATIC), parabola, half)
    length = tf.where((memory.count > 0) & inside(cubic, FROM_ENDS_CUBIC), cubic, length)
    return tf.where(tf.math.is_inf(high.loss), low.length + 0.1 * span, length)


def _minimum_of_parabola(low, high):
    """Through both points, with the slope of the first; infinite or NaN if there is none."""
    span = high.length - low.length
    curvature = (high.loss - low.loss - low.slope * span) / span**2
    return low.length - low.slope / (2.0 * curvature)


def _minimum_of_cubic(low, high, third):
    """Through three points, with the slope of the first; NaN if there is none."""
    b, c = high.length - low.length, third.length - low.length
    over_b = high.loss - low.loss - low.slope * b
    over_c = third.loss - low.loss - low.slope * c
    scale = (b * c) ** 2 * (b - c)
    cubic = (c**2 * over_b - b**2 * over_c) / scale
    square = (b**3 * over_c - c**3 * over_b) / scale
    return low.length + (-square + tf.sqrt(square**2 - 3.0 * cubic * low.slope)) / (3.0 * cubic)
