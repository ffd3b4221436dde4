"""Trust regions: a ball for the steps of a quadratic model, and a limit on natural-gradient steps in the Fisher metric.

A natural-gradient step `-lr d`, `d = F^-1 g`, changes the model's predictive distribution by about `1/2 lr^2 d'Fd = 1/2
lr^2 d'g` nats (Kullback-Leibler). This second-order expansion is accurate only near the weights.
"""

import dataclasses
from typing import ClassVar

import tensorflow as tf

from keras_curvature.component import Component, check, check_number, register


def kl_clip(bound, learning_rate, slope):
    """The factor `min(1, sqrt(bound / (learning_rate^2 d'g)))` on a direction `d`, a scalar.

    Args:
        bound: Largest `learning_rate^2 d'g`, a number.
        learning_rate: The learning rate of the step.
        slope: `d'g`, a scalar. If it is not positive, the factor is 1.

    Reference: Ba, Grosse and Martens, "Distributed second-order optimization using Kronecker-factored approximations"
    (2017), section 5.
    """
    length = tf.cast(learning_rate, slope.dtype) ** 2 * slope
    longer = length > bound
    # NaN stays NaN, and the step is skipped
    return tf.where(longer, tf.sqrt(bound / tf.where(longer, length, tf.ones_like(length))), 1.0 + 0.0 * length)


@register
@dataclasses.dataclass(frozen=True)
class TrustRegion(Component):
    """The radius of the ball in which a quadratic model is minimized, and how it adapts.

        ratio < low, or NaN:                             radius <- shrink * radius
        ratio > high, and the step ends at the sphere:   radius <- grow * radius

    with `ratio` the actual change of the loss divided by the one that the model predicts.

    Reference: Nocedal and Wright, "Numerical Optimization" (2006), Algorithm 4.1. Difference: (1) the smallest and the
    largest radius are bounds against 0 and infinity, which a radius could never leave again.

    Args:
        initial: Radius at the first step, positive. Defaults to `1.0`.
        low: Defaults to `0.25`.
        high: Defaults to `0.75`.
        shrink: In (0, 1). Defaults to `0.25`.
        grow: Above 1. Defaults to `2.0`.
        maximum: Largest radius. Defaults to `1e6`.

    Example: `NewtonCG(trust_region=TrustRegion(initial=0.1))`
    """

    initial: float = 1.0
    low: float = 0.25
    high: float = 0.75
    shrink: float = 0.25
    grow: float = 2.0
    maximum: float = 1e6

    def __post_init__(self):
        check_number(self, "initial", self.initial, low=0, open_low=True)
        check_number(self, "low", self.low, low=0)
        check_number(self, "high", self.high)
        check(self, "high", self.high, self.high >= self.low, f"at least `low` ({self.low})")
        check_number(self, "shrink", self.shrink, low=0, high=1, open_low=True, open_high=True)
        check_number(self, "grow", self.grow, low=1, open_low=True)
        check_number(self, "maximum", self.maximum, low=self.initial)

    def at(self, at_boundary: tf.Tensor) -> "Radius":
        """The rule after a step that ended at the sphere or not, for a `Trial`."""
        return Radius(self, at_boundary)


@dataclasses.dataclass(frozen=True)
class Radius:
    """The rule of a `TrustRegion` for one step: what a `Trial` asks for."""

    region: TrustRegion
    at_boundary: tf.Tensor
    every: ClassVar[int] = 1

    @property
    def initial(self) -> float:
        """The radius at the first step."""
        return self.region.initial

    def update(self, value: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
        """The next radius."""
        region, ratio = self.region, tf.cast(ratio, value.dtype)
        bad = (ratio < region.low) | tf.math.is_nan(ratio)
        grows = (ratio > region.high) & self.at_boundary
        shrunk = tf.maximum(region.shrink * value, 1e-30)
        return tf.where(bad, shrunk, tf.where(grows, tf.minimum(region.grow * value, region.maximum), value))
