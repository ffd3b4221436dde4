"""When a basis or a root is computed anew: when its matrix has moved away from it, each matrix by itself."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_curvature.component import Component, check, check_count, check_number, register
from keras_curvature.solvers import eigenbases
from keras_curvature.solvers.roots import in_units, without_failures


@register
@dataclasses.dataclass(frozen=True)
class Refresh(Component):
    """Refresh each basis or root when its matrix has changed by more than a tolerance.

        a basis Q, where    |B - diag B| > tolerance |B|,    B = Q' A Q
        a root,    where    |A - A_last| > tolerance |A|,    A_last: its matrix at the last root
        inverses of K-FAC,  where the trace of a factor, or the damping, has changed by the tolerance

    Both compare `A` with what stands for it: `Q diag(B) Q'`, whose eigenvalues are corrected in each step, or `A_last`.
    A look at a basis costs two products of its size, and at a root a difference; a basis takes one more product and a
    QR decomposition, a root an eigendecomposition. Of matrices of one size that are computed together, all are computed
    if one is due, and only the due ones are taken over.

    Reference: Eschenhagen et al., "Purifying Shampoo: Investigating Shampoo's heuristics by decomposing its
    preconditioner" (2025, arXiv 2506.03595), and github.com/facebookresearch/optimizers, `matrix_functions.py`; Chen et
    al., "THOR, trace-based hardware-driven layer-oriented natural gradient descent computation" (2021), for traces.
    Differences: (1) one QR iteration for each refresh, the first basis by an eigendecomposition, as all of EKFAC's; (2)
    the criterion for roots is this package's; (3) THOR leaves the damping out of the criterion, and stops refreshing
    for good below a second tolerance.

    Args:
        tolerance: In [0, 1); 0: computed anew at each look. Defaults to `0.01` (the authors' code).
        check_every: Steps from one look to the next. Defaults to `1`.

    Example: `SOAP(every=Refresh(0.1))`
    """

    tolerance: float = 0.01
    check_every: int = 1

    def __post_init__(self):
        check_number(self, "tolerance", self.tolerance, low=0, high=1, open_high=True)
        check_count(self, "check_every", self.check_every)

    def basis(self, matrices: tf.Tensor, bases: tf.Tensor, sort: bool) -> tf.Tensor:
        """The bases of a stack `(..., n, n)`, refined where they are due; NaN where that failed."""
        if not self.tolerance:
            return eigenbases.refine(matrices, bases, sort)
        due = self._off_diagonal(matrices, bases)
        return _taken_where(due, lambda: eigenbases.refine(matrices, bases, sort), bases)

    def eigenbasis(self, matrices: tf.Tensor, bases: tf.Tensor) -> tf.Tensor:
        """The bases of a stack, decomposed anew where they are due; NaN where that failed."""
        if not self.tolerance:
            return eigenbases.decompose(matrices)
        return _taken_where(self._off_diagonal(matrices, bases), lambda: eigenbases.decompose(matrices), bases)

    def changed(self, now: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        """Whether an entry of each row has changed by more than the tolerance; true where it is not finite."""
        if not self.tolerance:
            return tf.ones(now.shape[:1], tf.bool)
        same = tf.abs(now - last) <= self.tolerance * tf.abs(last)
        return tf.logical_not(tf.reduce_all(same, -1))

    def _off_diagonal(self, matrices, bases):
        """Whether bases no longer diagonalize their matrices, `(..., 1, 1)`; true where these are not finite."""
        finite, scaled = without_failures(matrices)
        B = tf.matmul(bases, tf.matmul(in_units(scaled)[1], bases), transpose_a=True)
        off = tf.linalg.set_diag(B, tf.zeros_like(tf.linalg.diag_part(B)))
        return self._is_due(off, B) | tf.logical_not(finite)

    def root(
        self, compute: Callable[[tf.Tensor], tf.Tensor], matrices: tf.Tensor, roots: tf.Tensor, last: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
        """`(roots, last)` after a look at a stack, by `compute` where they are due; NaN where that failed."""
        if not self.tolerance:
            return compute(matrices), matrices
        due = self._is_due(matrices - last, matrices) | tf.reduce_all(tf.equal(last, 0), (-2, -1), keepdims=True)
        found = _taken_where(due, lambda: compute(matrices), roots)
        failed = tf.reduce_any(tf.math.is_nan(found), (-2, -1), keepdims=True)
        return found, tf.where(due & tf.logical_not(failed), matrices, last)

    def _is_due(self, error, whole):
        """Whether the error is no longer small, `(..., 1, 1)`; true where it is not finite."""
        unit = tf.reduce_max(tf.abs(whole), (-2, -1), keepdims=True)
        small = _norm(error, unit) <= self.tolerance * _norm(whole, unit)
        return tf.logical_not(small)


def _norm(matrices, unit):
    return tf.norm(tf.math.divide_no_nan(matrices, unit), axis=(-2, -1), keepdims=True)


def _taken_where(due, compute, old):
    """`compute()` where it is due, else `old`; not computed where nothing of the stack is due."""
    new = tf.cond(tf.reduce_any(due), compute, lambda: tf.identity(old))
    return tf.where(due, new, old)


def check_every(owner, name, value):
    """Check that the argument is a number of steps or a `Refresh`."""
    valid = isinstance(value, Refresh) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
    check(owner, name, value, valid, "an integer >= 1 or a `Refresh`, already constructed")
