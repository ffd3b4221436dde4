"""Parts of matrices, for steps that are orthogonal in a part only: a low rank, or some of the rows.

The part leaves the momentum `B` as it enters the step, so that all other directions wait in it (error feedback):

    B = M + (1 - momentum) G,    step = orthogonal(part of B),    M <- B - (1 - momentum) part of B

All functions take stacks `(..., rows, columns)` with `rows <= columns`. The expensive half, `factors`, is shared among
the replicas; what it returns is all that they send, and is smaller than the matrix.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_curvature.component import Component, check_number, check_part, register
from keras_curvature.solvers.matrix_sign import MatrixSign
from keras_curvature.typing import Shape


class MatrixPart(Component):
    """Base of the parts: a subclass is a frozen dataclass with these three methods."""

    def state_shape(self, rows: int, columns: int) -> Shape | None:
        """The shape of the state of a matrix; `None`: it has none."""
        return None

    def factors(self, B: tf.Tensor, state: tf.Tensor | None, sign: MatrixSign) -> Any:
        """What the step is made of, a nest of tensors."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `factors(B, state, sign)`.")

    def step(self, B: tf.Tensor, state: tf.Tensor | None, factors: Any) -> tuple[tf.Tensor, tf.Tensor, Any]:
        """`(step, part, state)`: the orthogonal step, the part of `B` it is made of, the next state; `(..., r, c)`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `step(B, state, factors)`.")


@register
@dataclasses.dataclass(frozen=True)
class LowRankPart(MatrixPart):
    """A low rank, by one power iteration from the basis of the last step (Dion).

        P = qr(B' Q),    R = B P,    part = R P',    Q <- R / |columns of R|,    step = Q P'

    On a constant gradient `Q` and `P` tend to its largest singular vectors, so the step tends to the sign of the best
    approximation of its rank. It costs products of `rows x columns x rank` and a QR decomposition
    `(columns, rank)`; no matrix sign.

    Reference: Ahn et al., "Dion: Distributed orthonormalized updates" (2025), Algorithm 1, and
    github.com/microsoft/dion, `dion_reference.py`, whose rank is a share as here. Differences from that code: (1) a
    plain QR decomposition (there: randomized Cholesky QR); (2) columns of `R` that are rounding errors beside the
    largest give no step (there: `1e-8` is added to their norm); (3) the first `Q` is the same in each run.

    Args:
        rank: Rank of the step: a share of the rows (a float), rounded up, or a number (an integer). Defaults to
            `0.25`.

    Example: `Muon.dion(part=LowRankPart(64))`
    """

    rank: float | int = 0.25

    def __post_init__(self):
        check_part(self, "rank", self.rank, or_none=False)

    def state_shape(self, rows: int, columns: int) -> Shape:
        rank = self.rank if isinstance(self.rank, int) else math.ceil(self.rank * rows)
        return rows, min(rank, rows)

    def factors(self, B: tf.Tensor, state: tf.Tensor, sign: MatrixSign) -> tuple[tf.Tensor, tf.Tensor]:
        size = tf.reduce_max(tf.abs(B), axis=(-2, -1), keepdims=True)
        scaled = B * tf.math.reciprocal_no_nan(size)  # so that squares neither overflow nor vanish
        P, _ = tf.linalg.qr(tf.matmul(scaled, state, transpose_a=True))
        return P, tf.matmul(scaled, P)

    def step(self, B: tf.Tensor, state: tf.Tensor, factors: Any) -> tuple[tf.Tensor, tf.Tensor, Any]:
        P, R = factors
        norms = tf.norm(R, axis=-2, keepdims=True)
        rounding = B.shape[-1] * np.finfo(B.dtype.as_numpy_dtype).eps * tf.reduce_max(norms, axis=-1, keepdims=True)
        Q = tf.where(norms > rounding, tf.math.divide_no_nan(R, norms), tf.zeros_like(R))
        size = tf.reduce_max(tf.abs(B), axis=(-2, -1), keepdims=True)
        zero = tf.equal(size, 0)
        return tf.matmul(Q, P, transpose_b=True), size * tf.matmul(R, P, transpose_b=True), tf.where(zero, state, Q)


@register
@dataclasses.dataclass(frozen=True)
class RowPart(MatrixPart):
    """The rows, or columns if there are fewer of them, with the largest sums of absolute values (Dion2).

        K = the largest of sum_j |B_ij|,    step_K = sign(B_K),    part_K = B_K,    zero in all other rows

    It costs a matrix sign of `fraction` of the rows. `fraction=1` is Muon without Nesterov's step.

    Reference: Dion2 of github.com/microsoft/dion, `dion2.py`. Differences: as of `Muon`.

    Args:
        fraction: Share of the rows in a step, rounded up. Defaults to `0.25` (the authors).

    Example: `Muon.dion2(part=RowPart(0.5))`
    """

    fraction: float = 0.25

    def __post_init__(self):
        check_number(self, "fraction", self.fraction, low=0, high=1, open_low=True)

    def factors(self, B: tf.Tensor, state: None, sign: MatrixSign) -> tf.Tensor:
        count = math.ceil(self.fraction * B.shape[-2])
        chosen = tf.math.top_k(self._lengths(B), count).indices
        return sign.sign(tf.gather(B, chosen, axis=-2, batch_dims=B.shape.rank - 2))

    def step(self, B: tf.Tensor, state: None, factors: Any) -> tuple[tf.Tensor, tf.Tensor, None]:
        count, rows = factors.shape[-2], B.shape[-2]
        order = tf.math.top_k(self._lengths(B), rows).indices  # of equal rows the first, here and above
        place = tf.argsort(order, axis=-1)
        chosen = (place < count)[..., None]
        spread = tf.gather(factors, tf.minimum(place, count - 1), axis=-2, batch_dims=B.shape.rank - 2)
        return tf.where(chosen, spread, tf.zeros_like(B)), tf.where(chosen, B, tf.zeros_like(B)), None

    def _lengths(self, B):
        return tf.reduce_sum(tf.abs(B), axis=-1)
