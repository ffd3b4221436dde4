"""The line search of Hager and Zhang, with their approximate Wolfe conditions."""

import dataclasses
import functools
from typing import NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import Component, check, check_choice, check_count, check_number, register
from keras_curvature.steps.search import (
    CONDITIONS_MET,
    INTERVAL,
    KEEP,
    SEARCHING,
    START,
    TRIAL,
    Point,
    State,
    pick,
    switch,
)

# Which point was asked for: one to bracket, the middle of a bracket whose loss is too high at its right end (U3), the
# secant point, the second secant point (S1-S4), the middle of an interval that did not shrink (L2).
BRACKET, BISECT, SECANT, SECOND, MIDDLE = range(5)
# When bisections find nothing lower, the loss is less exact than `error` says: after so many of them `error` becomes so
# many times what the loss at the right end was too high (`nshrink` and `egrow` of CG_DESCENT), if that was at most this
# share of the loss. A higher one is no rounding.
BISECTIONS, GROWTH, ROUNDING = 10, 10.0, 1e-3


class Memory(NamedTuple):
    """What the search remembers: the interval, the interval before the secant step, and what is to be done."""

    left: Point
    right: Point
    old_left: Point
    old_right: Point
    phase: tf.Tensor
    shrinks: tf.Tensor  # after a bisection: whether the width of the interval is to be looked at
    high: Point  # the right end whose loss was too high
    bisections: tf.Tensor  # since then


class Plan(NamedTuple):
    """What a phase decides. What it leaves to be computed is the same for all of them, so a graph holds it once."""

    left: Point
    right: Point
    phase: tf.Tensor
    keep: tf.Tensor
    shrinks: tf.Tensor
    ends: tf.Tensor  # whether the interval is done with
    second: tf.Tensor  # the length to look at in the phase `SECOND`


@register
@dataclasses.dataclass(frozen=True)
class HagerZhang(Component):
    """Line search for the Wolfe conditions, or near a minimum for their approximation that rounding does not spoil.

        phi(s) <= phi(0) + decrease * s * phi'(0)    and    phi'(s) >= curvature * phi'(0)
        or, where phi(s) <= phi(0) + error * |phi(0)|:    (2 decrease - 1) phi'(0) >= phi'(s) >= curvature * phi'(0)

    An interval with a falling left and a rising right end shrinks by two secant steps on the slope at a time, and by
    bisection where these do not shrink it enough. The second line looks only at slopes, which are exact to many more
    digits than differences of losses, so the search finds a minimum to the last digits.

    Reference: Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line search"
    (2005), section 4, and Algorithm 851 (2006). Differences from the papers: (1) the condition of the 2006 paper, with
    `error * |phi(0)|`, in place of a running average; (2) one budget for all evaluations; (3) a point whose loss is not
    finite is the right end of a bracket that is bisected; (4) as in their code CG_DESCENT, `error` grows where it
    proves too small: after ten bisections without a lower loss, to ten times what the right end was too high, which is
    then looked at again; here only if that is at most 1e-3 of the loss. Later searches begin with that `error`.

    Args:
        decrease: `delta`, in (0, 1/2). Defaults to `0.1` (the papers, and TensorFlow Probability).
        curvature: `sigma`, in [`decrease`, 1). Defaults to `0.9`.
        error: `epsilon`, relative error of the loss at first, at least 0. Defaults to `1e-6`.
        expand: `rho`, factor on the length until there is a bracket, above 1. Defaults to `5.0`.
        shrink: `gamma`, share of its width to which two secant steps must shrink the interval, in (0, 1). Defaults to
            `0.66`.
        checks: Which points may end the search: `"all"` (the papers), or only those of secant steps, `"secant"`, as in
            TensorFlow Probability, which so spends an evaluation where the first length would do. Defaults to `"all"`.
        max_evaluations: Largest number of evaluations of loss and gradient. Defaults to `50`.

    Example: `LBFGS(search=HagerZhang(curvature=0.5))`
    """

    decrease: float = 0.1
    curvature: float = 0.9
    error: float = 1e-6
    expand: float = 5.0
    shrink: float = 0.66
    checks: str = "all"
    max_evaluations: int = 50

    def __post_init__(self):
        check_number(self, "decrease", self.decrease, low=0, high=0.5, open_low=True, open_high=True)
        check_number(self, "curvature", self.curvature, low=0, high=1, open_high=True)
        check(self, "curvature", self.curvature, self.curvature >= self.decrease,
              f"at least `decrease` ({self.decrease})")  # fmt: skip
        check_number(self, "error", self.error, low=0)
        check_number(self, "expand", self.expand, low=1, open_low=True)
        check_number(self, "shrink", self.shrink, low=0, high=1, open_low=True, open_high=True)
        check_choice(self, "checks", self.checks, ("all", "secant"))
        check_count(self, "max_evaluations", self.max_evaluations)

    def begin(self, start: Point, first: tf.Tensor) -> State:
        """The state before the first evaluation."""
        no, none = tf.constant(False), tf.constant(0)
        memory = Memory(start, start, start, start, tf.constant(BRACKET), no, start, none)
        return State(first, tf.constant(KEEP), tf.constant(SEARCHING), memory)

    def advance(self, start: Point, state: State, trial: Point) -> State:
        """The state after a trial."""
        steps = (self._bracketed, self._bisected, self._at_secant, self._at_second, self._at_middle)
        memory: Memory = state.memory
        error = tf.maximum(trees.exactly(self.error, tf.float64), state.rounding)
        limit = start.loss + error * tf.abs(start.loss)
        plan = switch(memory.phase, [functools.partial(step, start, limit, memory, trial) for step in steps])
        left, right = plan.left.length, plan.right.length
        middle, secant = 0.5 * (left + right), _secant_of(plan.left, plan.right)
        # by phase, in their order
        following = tf.gather(tf.stack([self.expand * trial.length, middle, secant, plan.second, middle]), plan.phase)
        anew = tf.equal(plan.phase, SECANT)
        old_left, old_right = pick(anew, plan.left, memory.old_left), pick(anew, plan.right, memory.old_right)

        counts = (memory.phase >= SECANT) & (memory.phase <= SECOND) | (self.checks == "all")
        found = counts & self._satisfied(start, limit, trial)
        bisects, bisected = tf.equal(plan.phase, BISECT), tf.equal(memory.phase, BISECT)
        high, bisections = pick(bisected, memory.high, trial), tf.where(bisects & bisected, memory.bisections + 1, 0)
        excess = (high.loss - start.loss) / tf.abs(start.loss)
        inexact = ~found & (bisections >= BISECTIONS) & (excess <= ROUNDING)  # false for a NaN
        phase, following = tf.where(inexact, BRACKET, plan.phase), tf.where(inexact, high.length, following)
        rounding = tf.where(inexact, GROWTH * excess, state.rounding)

        memory = Memory(plan.left, plan.right, old_left, old_right, phase, plan.shrinks & ~inexact, high, bisections)
        empty = tf.not_equal(phase, BRACKET) & (tf.math.nextafter(left, right) >= right)
        end = tf.where(found, CONDITIONS_MET, tf.where(empty | plan.ends, INTERVAL, SEARCHING))
        return State(following, tf.where(found, TRIAL, plan.keep), end, memory, rounding)

    def _satisfied(self, start, limit, trial):
        decreases = trial.loss <= start.loss + self.decrease * trial.length * start.slope
        nearly = (trial.loss <= limit) & (trial.slope <= (2 * self.decrease - 1) * start.slope)
        return tf.math.is_finite(trial.loss) & (trial.slope >= self.curvature * start.slope) & (decreases | nearly)

    # What follows a point, by phase.

    def _bracketed(self, start, limit, memory, trial):
        """B1-B3: the first rising point ends the bracket, a point that is too high is bisected from the start."""
        falls, rises = _falls(limit, trial), _rises(trial)
        left = pick(rises, memory.left, pick(falls, trial, start))
        phase, keep = (
            tf.where(rises, a, tf.where(falls, b, c)) for a, b, c in ((SECANT, BRACKET, BISECT), (KEEP, TRIAL, START))
        )
        return _plan(left, trial, phase, keep, memory.shrinks & (rises | falls))

    def _bisected(self, start, limit, memory, trial):
        """U3: until the right end rises."""
        falls = _falls(limit, trial)
        left, right = pick(falls, (trial, memory.right), (memory.left, trial))
        rises, (phase, ends) = _rises(right), self._by_width(memory, left, right)
        phase = tf.where(rises, tf.where(memory.shrinks, phase, SECANT), BISECT)
        return _plan(left, right, phase, tf.where(falls, TRIAL, KEEP), memory.shrinks, ends & rises & memory.shrinks)

    def _at_secant(self, start, limit, memory, trial):
        """S1-S3: update by the secant point; if it has become an end, its secant with the old end comes next."""
        left, right, keep, unfit = self._update(limit, memory, trial)
        is_left, is_right = tf.equal(left.length, trial.length), tf.equal(right.length, trial.length)
        second = tf.where(is_left, _secant_of(memory.left, left), _secant_of(memory.right, right))
        fits = (is_left | is_right) & (left.length <= second) & (second <= right.length)
        phase, ends = self._by_width(memory, left, right)
        phase = tf.where(unfit, BISECT, tf.where(fits, SECOND, phase))
        return _plan(left, right, phase, keep, memory.shrinks | unfit, ends & ~unfit & ~fits, second)

    def _at_second(self, start, limit, memory, trial):
        """S4, then L2."""
        left, right, keep, unfit = self._update(limit, memory, trial)
        phase, ends = self._by_width(memory, left, right)
        return _plan(left, right, tf.where(unfit, BISECT, phase), keep, memory.shrinks | unfit, ends & ~unfit)

    def _at_middle(self, start, limit, memory, trial):
        """L2, then L1 again."""
        left, right, keep, unfit = self._update(limit, memory, trial)
        return _plan(left, right, tf.where(unfit, BISECT, SECANT), keep, memory.shrinks & ~unfit)

    def _update(self, limit, memory, trial):
        """U0-U2: `(left, right, keep, whether the right end is now too high)`."""
        within = (memory.left.length < trial.length) & (trial.length < memory.right.length)
        falls = within & _falls(limit, trial)
        rests = within & ~falls
        left, right = pick(falls, trial, memory.left), pick(rests, trial, memory.right)
        return left, right, tf.where(falls, TRIAL, KEEP), rests & ~_rises(trial)

    def _by_width(self, memory, left, right):
        """L2: the middle of an interval that the secant steps did not shrink enough; else the next secant step."""
        enough = right.length - left.length < self.shrink * (memory.old_right.length - memory.old_left.length)
        flat = tf.equal(memory.old_left.loss, memory.old_right.loss) & tf.equal(left.loss, right.loss)
        return tf.where(enough, SECANT, MIDDLE), enough & flat


def _plan(left, right, phase, keep, shrinks, ends=False, second=0.0):
    return Plan(left, right, phase, keep, shrinks, tf.convert_to_tensor(ends), tf.convert_to_tensor(second, tf.float64))


def _falls(limit, point):
    """Whether the point can be a left end."""
    return (point.slope < 0) & (point.loss <= limit)


def _rises(point):
    return tf.math.is_finite(point.loss) & (point.slope >= 0)


def _secant_of(a, b):
    """Where the line through both slopes is zero."""
    return tf.math.divide_no_nan(a.length * b.slope - b.length * a.slope, b.slope - a.slope)
