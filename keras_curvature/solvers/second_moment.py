"""Signs of matrices divided by the root of their own second moment, so that no output moves less than the others."""

import dataclasses
from typing import Literal

import tensorflow as tf

from keras_curvature.component import Component, check, check_number, register
from keras_curvature.typing import Shape

EPSILON = 1e-10  # added to the second moment, for rows that have never moved


@register
@dataclasses.dataclass(frozen=True)
class SecondMoment(Component):
    """Divide the sign of a matrix by the root of a running second moment, and give it its norm back.

        v <- beta v + (1 - beta) mean(O^2),    O <- O / sqrt(v) * |O| / |O / sqrt(v)|

    With `per="output"` the mean is over the inputs of an output, one number for each column of Keras' kernels
    (NorMuon); with `"entry"` every entry has a number of its own (AdaMuon).

    Reference: Li et al., "NorMuon: Making Muon more efficient and scalable" (2025), Algorithm 1; Si et al., "AdaMuon:
    Adaptive Muon optimizer" (2025), Algorithm 1. Differences: (1) AdaMuon's code takes the sign of each entry of
    the momentum before the matrix sign; here it is the momentum; (2) AdaMuon's step has the norm of a matrix with
    entries of 1 in the mean, before the scale; here that of the sign; (3) NorMuon's code has the means of a convolution
    over the last axis of its windows; here they are over all inputs and positions of an output; (4) 1e-10 is added to
    `v`, in the code of NorMuon to its root: rows of rounding errors do not grow to full steps.

    Args:
        per: `"output"` or `"entry"`. Defaults to `"output"`.
        beta: Decay of the second moment. Defaults to `0.95` (both).

    Example: `Muon(normalization=SecondMoment())`
    """

    per: Literal["output", "entry"] = "output"
    beta: float = 0.95

    def __post_init__(self):
        check(self, "per", self.per, self.per in ("output", "entry"), '"output" or "entry"')
        check_number(self, "beta", self.beta, low=0, high=1, open_high=True)

    def shape(self, matrix: Shape) -> Shape:
        """The shape of the state of a matrix, or of a stack of matrices."""
        return tuple(matrix) if self.per == "entry" else (*matrix[:-2], 1, matrix[-1])

    def normalized(self, matrices: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`(O, v)` of matrices `(..., inputs, outputs)`."""
        squares = tf.square(matrices)
        mean = squares if self.per == "entry" else tf.reduce_mean(squares, axis=-2, keepdims=True)
        state = self.beta * state + (1.0 - self.beta) * mean
        divided = matrices * tf.math.rsqrt(state + EPSILON)
        return divided * tf.math.divide_no_nan(_norm(matrices), _norm(divided)), state


def _norm(matrices):
    return tf.norm(matrices, axis=(-2, -1), keepdims=True)
