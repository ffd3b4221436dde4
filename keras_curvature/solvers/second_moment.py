"""Second moments beside a matrix sign: of the signs, which are divided after it, or of the gradients, before it."""

import dataclasses
from typing import Literal

import tensorflow as tf

from keras_curvature.component import Component, check_choice, check_number, register
from keras_curvature.typing import Shape

EPSILON = 1e-10  # added to the second moment, for rows that have never moved


class Normalization(Component):
    """Base of the two: a subclass replaces `before` or `after`. All matrices are `(..., inputs, outputs)`."""

    def shape(self, matrix: Shape) -> Shape:
        """The shape of the state of a matrix, or of a stack of matrices."""
        return tuple(matrix)

    def before(self, matrices: tf.Tensor, gradients: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`(M, v)`: the matrices whose sign is taken, and the next state."""
        return matrices, state

    def after(self, signs: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`(O, v)`: the step made of the signs, and the next state."""
        return signs, state


@register
@dataclasses.dataclass(frozen=True)
class SecondMoment(Normalization):
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
        check_choice(self, "per", self.per, ("output", "entry"))
        check_number(self, "beta", self.beta, low=0, high=1, open_high=True)

    def shape(self, matrix: Shape) -> Shape:
        """The shape of the state of a matrix, or of a stack of matrices."""
        return tuple(matrix) if self.per == "entry" else (*matrix[:-2], 1, matrix[-1])

    def after(self, signs: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        squares = tf.square(signs)
        mean = squares if self.per == "entry" else tf.reduce_mean(squares, axis=-2, keepdims=True)
        state = self.beta * state + (1.0 - self.beta) * mean
        divided = signs * tf.math.rsqrt(state + EPSILON)
        return divided * tf.math.divide_no_nan(_norm(signs), _norm(divided)), state


@register
@dataclasses.dataclass(frozen=True)
class GradientMoment(Normalization):
    """Divide each entry of the momentum by the root of the gradient's second moment, before the sign (Muon^2).

        v <- beta v + (1 - beta) G^2,    O = sign(M / sqrt(v + epsilon))

    The singular values of the quotient are closer to one another, so the sign needs fewer iterations.

    Reference: Liu et al., "Muon^2: Boosting Muon via adaptive second-moment preconditioning" (2026, arXiv 2604.09967).
    Difference: momentum, Nesterov's step and the scale of the result are those of `Muon`.

    Args:
        beta: Decay of the second moment. Defaults to `0.95` (as of the momentum).
        epsilon: Added to the second moment. Defaults to `1e-16`, the square of Adam's `1e-8`, which is added to the
            root.

    Example: `Muon(normalization=GradientMoment())`
    """

    beta: float = 0.95
    epsilon: float = 1e-16

    def __post_init__(self):
        check_number(self, "beta", self.beta, low=0, high=1, open_high=True)
        check_number(self, "epsilon", self.epsilon, low=0, open_low=True)

    def before(self, matrices: tf.Tensor, gradients: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        state = self.beta * state + (1.0 - self.beta) * tf.square(gradients)
        return matrices * tf.math.rsqrt(state + self.epsilon), state


def _norm(matrices):
    return tf.norm(matrices, axis=(-2, -1), keepdims=True)
