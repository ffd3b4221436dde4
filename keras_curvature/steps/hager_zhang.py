"""The line search of Hager and Zhang, with their approximate Wolfe conditions."""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_curvature.component import Component, check, check_count, check_number, register
from keras_curvature.steps.search import CONDITIONS_MET, INTERVAL, KEEP, SEARCHING, START, TRIAL, Point, State, pick

# Which point was asked for: one to bracket, the middle of a bracket whose loss is too high at its right end (U3), the
# secant point, the second secant point (S1-S4), the middle of an interval that did not shrink (L2).
BRACKET, BISECT, SECANT, SECOND, MIDDLE = range(5)


class Memory(NamedTuple):
    """What the search remembers: the interval, the interval before the secant step, and what is to be done."""

    left: Point
    right: Point
    old_left: Point
    old_right: Point
    phase: tf.Tensor
    shrinks: tf.Tensor  # after a bisection: whether the width of the interval is to be looked at


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
    finite is the right end of a bracket that is bisected.

    Args:
        decrease: `delta`, in (0, 1/2). Defaults to `0.1` (the papers, and TensorFlow Probability).
        curvature: `sigma`, in [`decrease`, 1). Defaults to `0.9`.
        error: `epsilon`, relative error of the loss, at least 0. Defaults to `1e-6`.
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
        check(self, "checks", self.checks, self.checks in ("all", "secant"), '"all" or "secant"')
        check_count(self, "max_evaluations", self.max_evaluations)

    def begin(self, start: Point, first: tf.Tensor) -> State:
        """The state before the first evaluation."""
        memory = Memory(start, start, start, start, tf.constant(BRACKET), tf.constant(False))
        return State(first, tf.constant(KEEP), tf.constant(SEARCHING), memory)

    def advance(self, start: Point, state: State, trial: Point) -> State:
        """The state after a trial."""
        steps = (self._bracketed, self._bisected, self._at_secant, self._at_second, self._at_middle)
        phase = state.memory.phase
        after = tf.switch_case(phase, [lambda step=step: step(start, state, trial) for step in steps])
        counts = (phase >= SECANT) & (phase <= SECOND) if self.checks == "secant" else tf.constant(True)
        found = counts & self._satisfied(start, trial)
        return after._replace(
            keep=tf.where(found, TRIAL, after.keep), end=tf.where(found, CONDITIONS_MET, after.end)
        )  # fmt: skip

    def _satisfied(self, start, trial):
        decreases = trial.loss <= start.loss + self.decrease * trial.length * start.slope
        nearly = (trial.loss <= self._limit(start)) & (trial.slope <= (2 * self.decrease - 1) * start.slope)
        return tf.math.is_finite(trial.loss) & (trial.slope >= self.curvature * start.slope) & (decreases | nearly)

    def _limit(self, start):
        return start.loss + self.error * tf.abs(start.loss)

    def _falls(self, start, trial):
        """Whether the point can be a left end."""
        return (trial.slope < 0) & (trial.loss <= self._limit(start))

    # What follows a point, by phase.

    def _bracketed(self, start, state, trial):
        """B1-B3: the first rising point ends the bracket, a point that is too high is bisected from the start."""
        falls, rises = self._falls(start, trial), _rises(trial)
        bracket = state.memory._replace(right=trial)
        onward = _ask(BRACKET, self.expand * trial.length, TRIAL, bracket._replace(left=trial))
        bisect = _bisect(bracket._replace(left=start, shrinks=tf.constant(False)), START)
        return pick(rises, _secant(bracket, KEEP), pick(falls, onward, bisect))

    def _bisected(self, start, state, trial):
        """U3: until the right end rises."""
        memory, falls = state.memory, self._falls(start, trial)
        closer = memory._replace(left=pick(falls, trial, memory.left), right=pick(falls, memory.right, trial))
        keep = tf.where(falls, TRIAL, KEEP)
        done = pick(memory.shrinks, self._look_at_width(closer, keep), _secant(closer, keep))
        return pick(_rises(closer.right), done, _bisect(closer, keep))

    def _at_secant(self, start, state, trial):
        """S1-S3: update by the secant point; if it has become an end, its secant with the old end comes next."""
        old, (memory, keep, unfit) = state.memory, self._update(start, state.memory, trial)
        is_left, is_right = tf.equal(memory.left.length, trial.length), tf.equal(memory.right.length, trial.length)
        second = tf.where(is_left, _secant_of(old.left, memory.left), _secant_of(old.right, memory.right))
        fits = (is_left | is_right) & (memory.left.length <= second) & (second <= memory.right.length)
        plain = pick(fits, _ask(SECOND, second, keep, memory), self._look_at_width(memory, keep))
        return pick(unfit, _bisect(memory._replace(shrinks=tf.constant(True)), keep), plain)

    def _at_second(self, start, state, trial):
        """S4, then L2."""
        memory, keep, unfit = self._update(start, state.memory, trial)
        bisect = _bisect(memory._replace(shrinks=tf.constant(True)), keep)
        return pick(unfit, bisect, self._look_at_width(memory, keep))

    def _at_middle(self, start, state, trial):
        """L2, then L1 again."""
        memory, keep, unfit = self._update(start, state.memory, trial)
        bisect = _bisect(memory._replace(shrinks=tf.constant(False)), keep)
        return pick(unfit, bisect, _secant(memory, keep))

    def _update(self, start, memory, trial):
        """U0-U2: `(memory, keep, whether the right end is now too high)`."""
        within = (memory.left.length < trial.length) & (trial.length < memory.right.length)
        falls = within & self._falls(start, trial)
        right = within & ~falls
        closer = memory._replace(left=pick(falls, trial, memory.left), right=pick(right, trial, memory.right))
        return closer, tf.where(falls, TRIAL, KEEP), right & ~_rises(trial)

    def _look_at_width(self, memory, keep):
        """L2: the middle of an interval that the secant steps did not shrink enough; else the next secant step."""
        width, before = memory.right.length - memory.left.length, memory.old_right.length - memory.old_left.length
        enough = width < self.shrink * before
        flat = tf.equal(memory.old_left.loss, memory.old_right.loss) & tf.equal(memory.left.loss, memory.right.loss)
        middle = _ask(MIDDLE, _middle_of(memory), keep, memory)
        after = pick(enough, _secant(memory, keep), middle)
        return after._replace(end=tf.where(enough & flat, INTERVAL, after.end))


def _rises(point):
    return tf.math.is_finite(point.loss) & (point.slope >= 0)


def _middle_of(memory):
    return 0.5 * (memory.left.length + memory.right.length)


def _secant_of(a, b):
    """Where the line through both slopes is zero."""
    return tf.math.divide_no_nan(a.length * b.slope - b.length * a.slope, b.slope - a.slope)


def _secant(memory, keep):
    """Ask for the secant point of the interval."""
    memory = memory._replace(old_left=memory.left, old_right=memory.right)
    return _ask(SECANT, _secant_of(memory.left, memory.right), keep, memory)


def _bisect(memory, keep):
    return _ask(BISECT, _middle_of(memory), keep, memory)


def _ask(phase, length, keep, memory):
    """The state that asks for a length; the search ends where the interval has no more numbers in it."""
    left, right = memory.left.length, memory.right.length
    empty = tf.constant(phase != BRACKET) & (tf.math.nextafter(left, right) >= right)
    end = tf.where(empty, INTERVAL, SEARCHING)
    return State(length, tf.convert_to_tensor(keep), end, memory._replace(phase=tf.constant(phase)))
