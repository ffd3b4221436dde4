"""Damping: the multiple of the identity that is added to a curvature matrix, and how it adapts.

A quadratic model of the loss is accurate only near the weights; a larger damping `lambda` in `(B + lambda I) d = -g`
gives a shorter step. The records here are pure functions of the present damping; the optimizer owns the variable.
"""

import dataclasses
from typing import Any, Protocol, Self

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


def as_damping(owner: Any, damping: Any) -> Damping:
    """The component for the argument `damping`: itself, or a `ConstantDamping` for a number."""
    if is_number(damping):
        check_number(owner, "damping", damping, low=0)
        return ConstantDamping(float(damping))
    valid = isinstance(damping, Component) and all(hasattr(damping, name) for name in ("initial", "every", "update"))
    expected = "a number or a component such as `LevenbergMarquardt()`, already constructed"
    check(owner, "damping", damping, valid, expected)
    return damping
