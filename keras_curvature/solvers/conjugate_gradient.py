"""Conjugate gradients with Martens' stopping rule and stored iterates.

The loop is a `tf.while_loop`, so the stopping rule ends it early. Under a distribution strategy it runs outside the
replicas (see `replicas.py`) and ends early too.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_flag, check_number, register
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers.base import Solution, Solver, require_psd
from keras_curvature.typing import Vector


@register
@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Preconditioned conjugate gradients for a positive semi-definite operator.

    With the iterate `x_i` after iteration `i`, the residual `r_i = b - A x_i` and the quadratic
    `q_i = 1/2 x_i'A x_i - b'x_i`, the loop stops when

        i > k,   q_{i-k} < 0   and   (q_i - q_{i-k}) / q_i < k * progress_tolerance,      k = max(10, ceil(i / 10))

    or when `|r_i| <= residual_tolerance |b|`, after `max_steps` iterations, or at a direction `p` without positive
    curvature (`p'Ap <= 0`). The iterates `ceil(5 * 1.3^j)` (5, 7, 9, 11, 15, ...) and the last one are stored, for the
    backtracking of `HessianFree`.

    Reference: Martens (2010), section 4.4, and his code. Difference from the paper: (1) the sign of `q_{i-k}` is
    tested, as in his code; the paper tests the sign of `q_i`. Both are negative after the first iterations, except from
    a warm start that is worse than zero.

    Args:
        max_steps: Largest number of iterations. Defaults to `250` (Martens).
        progress_tolerance: Smallest relative progress per iteration, see above; `0.0`: no limit. Defaults to `5e-4`
            (Martens).
        residual_tolerance: Relative residual at which the loop stops; `0.0`: only at an exact solution. Defaults to
            `0.0`.
        truncate: Whether to accept an operator that is not positive semi-definite, such as a Hessian, and to stop at
            the first direction of negative curvature with the iterate so far. Defaults to `False`.

    Raises:
        ValueError: In `solve`, if the operator is not `psd` and `truncate` is false.

    Example: `HessianFree(solver=ConjugateGradient(max_steps=50))`
    """

    max_steps: int = 250
    progress_tolerance: float = 5e-4
    residual_tolerance: float = 0.0
    truncate: bool = False
    stores_iterates: ClassVar[bool] = True

    def __post_init__(self):
        check_count(self, "max_steps", self.max_steps)
        check_number(self, "progress_tolerance", self.progress_tolerance, low=0)
        check_number(self, "residual_tolerance", self.residual_tolerance, low=0)
        check_flag(self, "truncate", self.truncate)

    def solve(
        self, operator: LinearOperator, rhs: Vector, start: Vector | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Solution:  # fmt: skip
        """The `Solution`, with the stored iterates. See `Solver.solve` for the arguments."""
        if not self.truncate:
            require_psd(
                operator, "ConjugateGradient",
                "Use the Gauss-Newton matrix, choose a loss that is convex in the model's outputs, or pass "
                "`ConjugateGradient(truncate=True)` to end at the first direction of negative curvature.",
            )  # fmt: skip
        precondition = (lambda r: r) if preconditioner is None else (lambda r: preconditioner @ r)
        goal = self.residual_tolerance**2 * trees.squared_norm(rhs)
        begin = self._from_zero(rhs, precondition) if start is None else self._towards(start, rhs)
        end = tf.while_loop(
            lambda state: state.live, lambda state: (self._iterate(state, operator, precondition, goal),), (begin,)
        )[0]
        return self._solution(end, rhs)

    def _from_zero(self, rhs, precondition):
        """The state at `x_0 = 0`."""
        z, nothing = precondition(rhs), 0.0 * trees.squared_norm(rhs)
        rz = trees.dot(rhs, z)
        return self._state(rz > 0, tf.math.is_finite(rz), 0, rhs, z, rz, nothing)

    def _towards(self, start, rhs):
        """The state before a step of length one from zero to `x_0`.

        It is iteration 0 of the loop, and not a product before it: the graph has one product, not two.
        """
        rz = tf.zeros((), trees.scalar_dtype(rhs))  # so that the next direction has no part of this one
        return self._state(tf.constant(True), tf.constant(True), -1, rhs, list(start), rz, -trees.dot(start, rhs))

    def _state(self, live, finite, i, r, p, rz, q):
        stored = [self._array(a, len(self._stored_steps()) + 1) for a in r]
        history = self._array(q, self.max_steps + 1).write(0, q)
        return _State(
            live, finite, tf.constant(i), trees.zeros_like(r), list(r), p, rz, q, history, stored,
            tf.constant(0),
        )  # fmt: skip

    def _iterate(self, s, operator, precondition, goal):
        """One iteration, `_State` to `_State`."""
        Ap = operator @ s.p
        curvature, starts = trees.dot(s.p, Ap), s.i < 0
        curved = starts | (curvature > 0)
        alpha = tf.where(curved, s.rz / tf.where(curved, curvature, tf.ones_like(curvature)), tf.zeros_like(s.rz))
        alpha = tf.where(starts, tf.ones_like(alpha), alpha)
        x, r = trees.add(s.x, s.p, alpha), trees.add(s.r, Ap, -alpha)
        z = precondition(r)
        rz = trees.dot(r, z)
        p = trees.add(z, s.p, tf.math.divide_no_nan(rz, s.rz))
        i = s.i + tf.cast(curved, tf.int32)
        # p'r = z'r, so q(x + alpha p) needs no other inner product; before the start, q is -b'p
        q = s.q + 0.5 * tf.where(starts, curvature, -alpha * s.rz)
        history = s.history.write(i, q)
        finite = s.finite & tf.math.is_finite(curvature) & tf.math.is_finite(rz)
        live = finite & curved & (i < self.max_steps) & (rz > 0) & tf.logical_not(self._no_progress(i, q, history))
        if self.residual_tolerance:
            live &= trees.squared_norm(r) > goal
        keep = live & tf.reduce_any(i == tf.constant(self._stored_steps(), tf.int32))
        stored = tf.cond(
            keep,
            lambda: [array.write(s.count, a) for array, a in zip(s.stored, x)],
            lambda: list(s.stored),
        )
        return _State(live, finite, i, x, r, p, rz, q, history, stored, s.count + tf.cast(keep, tf.int32))

    def _no_progress(self, i, q, history):
        if not self.progress_tolerance:
            return tf.constant(False)
        gap = tf.maximum(10, (i + 9) // 10)
        before = history.read(tf.maximum(i - gap, 0))
        slow = (q - before) / q < self.progress_tolerance * tf.cast(gap, q.dtype)
        return (i > gap) & (before < 0) & slow

    def _solution(self, end, rhs):
        # the last iterate is always stored; `identity`, because TensorFlow warns of a written array that is never read,
        # and the caller may not read the iterates
        stored = [array.write(end.count, a).identity() for array, a in zip(end.stored, end.x)]

        def iterate(j):
            return [tf.ensure_shape(array.read(j), a.shape) for array, a in zip(stored, rhs)]

        def quadratic(j):
            steps = tf.constant([*self._stored_steps(), 0])
            return end.history.read(tf.where(j < end.count, tf.gather(steps, j), end.i))

        residual = tf.math.divide_no_nan(trees.norm(end.r), trees.norm(rhs))
        return Solution(end.x, end.i, residual, end.finite, end.count + 1, iterate, quadratic)

    def _stored_steps(self):
        steps = [math.ceil(5 * 1.3**j) for j in range(100)]
        return [i for i in steps if i < self.max_steps]

    @staticmethod
    def _array(like, size):
        return tf.TensorArray(like.dtype, size, element_shape=like.shape, clear_after_read=False)


class _State(NamedTuple):
    """The variables of the loop. Storing an iterate in `stored` copies nothing."""

    live: tf.Tensor
    finite: tf.Tensor
    i: tf.Tensor
    x: list
    r: list
    p: list
    rz: tf.Tensor
    q: tf.Tensor
    history: tf.TensorArray
    stored: list
    count: tf.Tensor
