"""Damping: the multiple of the identity that is added to a curvature matrix, and how it adapts.

A quadratic model of the loss is accurate only near the weights; a larger damping `lambda` in `(B + lambda I) d = -g`
gives a shorter step. The records here are pure functions of the present damping; the optimizer owns the variable.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, Self

import tensorflow as tf

from keras_curvature.component import Component, check, check_count, check_number, is_number, register


class Damping(Protocol):
    """What a component must have to be a damping."""

    @property
    def initial(self) -> float:
        """The damping at the first step."""

    @property
    def every(self) -> int | None:
        """Steps between two checks of the reduction ratio; `None`: no check."""

    def update(self, value: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
        """The next damping, from the present damping and the reduction ratio, both scalar tensors."""


@register
@dataclasses.dataclass(frozen=True)
class ConstantDamping(Component):
    """The same damping at every step.

    Args:
        initial: The damping, at least 0. Defaults to `1e-3`.

    Example: `CurveBall(damping=ConstantDamping(0.1))`, or for short `CurveBall(damping=0.1)`.
    """

    initial: float = 1e-3

    def __post_init__(self):
        check_number(self, "initial", self.initial, low=0)

    @property
    def every(self) -> None:
        """`None`: the reduction ratio is not needed and not computed."""
        return None

    def update(self, value: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
        """The damping, unchanged."""
        return value


@register
@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(Component):
    """Decreases the damping if the quadratic model predicted the loss well, and increases it otherwise.

        ratio > high:          lambda <- lambda * decay^every
        ratio < low, or NaN:   lambda <- lambda / decay^every

    with `ratio` the actual change of the loss divided by the predicted one. The factor is `decay` to the power of the
    steps between two checks, as in CurveBall's reference code.

    Reference: Martens (2010), section 4.1; Henriques et al. (2018), section 3.2.

    Args:
        initial: Damping at the first step, positive. Defaults to `1.0`.
        decay: Factor per step, in (0, 1). Defaults to `0.999` (CurveBall; Martens: 2/3).
        low: The damping increases if the ratio is below. Defaults to `0.5` (CurveBall; Martens: 1/4).
        high: The damping decreases if the ratio is above. Defaults to `1.5` (CurveBall; Martens: 3/4).
        every: Steps between two checks; each costs one evaluation of the loss. Defaults to `5`.
        minimum: Smallest damping. Defaults to `0.0` (the references have no bound).

    Example: `CurveBall(damping=LevenbergMarquardt(initial=10.0))`
    """

    initial: float = 1.0
    decay: float = 0.999
    low: float = 0.5
    high: float = 1.5
    every: int = 5
    minimum: float = 0.0

    def __post_init__(self):
        check_number(self, "initial", self.initial, low=0, open_low=True)
        check_number(self, "decay", self.decay, low=0, high=1, open_low=True, open_high=True)
        check_number(self, "low", self.low)
        check_number(self, "high", self.high)
        check(self, "low", self.low, self.low <= self.high, f"at most `high` ({self.high})")
        check_count(self, "every", self.every)
        check_number(self, "minimum", self.minimum, low=0)

    @classmethod
    def martens(cls, initial: float = 1.0, **kwargs: Any) -> Self:
        """The rule of Martens (2010): times 2/3 if the ratio is above 3/4, divided by 2/3 if below 1/4, in every step.

        Example: `HessianFree(damping=LevenbergMarquardt.martens(initial=45.0))`
        """
        return cls(**{"initial": initial, "decay": 2 / 3, "low": 0.25, "high": 0.75, "every": 1, **kwargs})

    def update(self, value: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
        """The next damping, from the present damping and the reduction ratio, both scalar tensors."""
        ratio, factor = tf.cast(ratio, value.dtype), self.decay**self.every
        # the damping could never leave 0 or infinity again
        grown, shrunk = tf.minimum(value / factor, 1e30), tf.maximum(value * factor, max(self.minimum, 1e-30))
        bad = (ratio < self.low) | tf.math.is_nan(ratio)
        return tf.where(bad, grown, tf.where(ratio > self.high, shrunk, value))


@register
@dataclasses.dataclass(frozen=True)
class Nielsen(Component):
    """Damping by a smooth function of the reduction ratio, which grows faster with each rejected step.

        ratio > 0:            lambda <- lambda * max(1/3, 1 - (2 ratio - 1)^3),     nu <- 2
        else, or NaN:         lambda <- lambda * nu,                                nu <- 2 nu

    The first damping is `tau` times the largest diagonal entry of the Gauss-Newton matrix in the metric of the damping.

    Reference: Nielsen, "Damping parameter in Marquardt's method" (1999); Madsen, Nielsen and Tingleff, "Methods for
    non-linear least squares problems" (2004), algorithm 3.16. Difference: (1) `lambda` stays between `minimum` and
    1e30, and `nu` below 2^32 (jaxopt's bound for both, at which targets of 1e9 stalled).

    Args:
        tau: The first damping, relative to the curvature, positive. Defaults to `1e-6` (jaxopt; the book: 1e-6 near a
            solution, else 1e-3 or 1).
        minimum: Smallest damping. Defaults to `1e-30`.

    Example: `GaussNewton(damping=Nielsen(tau=1e-3))`
    """

    tau: float = 1e-6
    minimum: float = 1e-30
    numbers: ClassVar[int] = 2

    def __post_init__(self):
        check_number(self, "tau", self.tau, low=0, open_low=True)
        check_number(self, "minimum", self.minimum, low=0, open_low=True)

    @property
    def initial(self) -> tuple[float, float]:
        """`(0, 2)`: no damping yet, and the factor after a rejection."""
        return 0.0, 2.0

    @property
    def every(self) -> int:
        """1: every step is checked."""
        return 1

    def begun(self, value: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
        """The pair for the present step, `lambda` set if it was 0; `largest` is the largest diagonal entry."""
        relative = self.tau * tf.cast(tf.where(largest > 0, largest, tf.ones_like(largest)), value.dtype)
        return tf.stack([tf.where(value[0] > 0, value[0], tf.maximum(relative, self.minimum)), value[1]])

    def update(self, value: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
        """The next pair `(lambda, nu)`, from the present one and the reduction ratio."""
        ratio, damping, nu = tf.cast(ratio, value.dtype), value[0], value[1]
        off = 2.0 * ratio - 1.0
        factor = tf.maximum(tf.constant(1.0 / 3.0, value.dtype), 1.0 - off * off * off)
        better = tf.stack([tf.maximum(damping * factor, self.minimum), 2.0 * tf.ones_like(nu)])
        worse = tf.stack([tf.minimum(damping * nu, 1e30), tf.minimum(2.0 * nu, 2.0**32)])
        return tf.where(ratio > 0, better, worse)  # false for NaN


def as_damping(owner: Any, damping: Any, numbers: int = 1) -> Damping:
    """The component for the argument `damping`: itself, or a `ConstantDamping` for a number.

    Args:
        owner: The optimizer, for messages.
        damping: The argument.
        numbers: How many numbers of state the optimizer keeps for the component. Defaults to `1`.
    """
    if is_number(damping):
        check_number(owner, "damping", damping, low=0)
        return ConstantDamping(float(damping))
    valid = isinstance(damping, Component) and all(hasattr(damping, name) for name in ("initial", "every", "update"))
    valid = valid and getattr(damping, "numbers", 1) <= numbers
    expected = "a number or a component such as `LevenbergMarquardt()`, already constructed"
    check(owner, "damping", damping, valid, expected)
    return damping
