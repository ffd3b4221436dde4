"""The heat equation and Burgers' equation, as Keras layers whose outputs are residuals; see `residuals.py`.

A row of the input is `[t, x, a, b]`, and the output for it is

    a * (the equation at the point) + b * (u at the point minus its data)

with `b = 0` inside of the domain, and `a = 0` at the first moment and on both sides.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.problems.base import Problem
from keras_curvature.problems.residuals import ResidualNetwork, centres, of_residuals, rows

CONDUCTIVITY, VISCOSITY = 0.25, 0.01 / np.pi
GOLDEN = 0.5 * (np.sqrt(5.0) - 1.0)
# Nodes of the quadrature for Burgers' equation: twice as many change the solution by less than 1e-12.
NODES = 200


def _heat(t, x):
    """`exp(-pi^2 t / 4) sin(pi x)`."""
    return np.exp(-CONDUCTIVITY * np.pi**2 * t) * np.sin(np.pi * x)


def _burgers(t, x):
    """The Cole-Hopf transform, by Gauss-Hermite quadrature; `t` must be positive."""
    nodes, weights = np.polynomial.hermite.hermgauss(NODES)
    y = x[..., np.newaxis] - np.sqrt(4.0 * VISCOSITY * t)[..., np.newaxis] * nodes
    kernel = weights * np.exp(-(np.cos(np.pi * y) + 1.0) / (2.0 * np.pi * VISCOSITY))
    # far from x = 0 all terms are small: relative to the largest
    kernel /= kernel.max(-1, keepdims=True)
    return -np.sum(np.sin(np.pi * y) * kernel, -1) / np.sum(kernel, -1)


# The sign of the initial values `sin(pi x)`, the first and the last x, the solution.
EQUATIONS = {"heat": (1.0, 0.0, 1.0, _heat), "burgers": (-1.0, -1.0, 1.0, _burgers)}


@keras.saving.register_keras_serializable(package="keras_curvature")
class DiffusionResiduals(ResidualNetwork):
    """Residuals of an equation in time and one coordinate, with a sine as its initial values and zeros on both sides.

    Args:
        equation: `"heat"` or `"burgers"`. Defaults to `"heat"`.
        widths: Widths of the hidden layers of the network `u`, tanh layers. Defaults to `(32,)`.
        **options: Of `keras.layers.Layer`.
    """

    def __init__(self, equation="heat", widths=(32,), **options):
        super().__init__(**options)
        self.equation, self.widths = equation, tuple(widths)

    def build(self, input_shape):
        self.create_network(2, self.widths, kernel_initializer="glorot_normal")

    def solution(self, points):
        """The solution at an array of points with `t > 0`: `(batch, 1)`."""
        points = np.asarray(points, "float64")
        return EQUATIONS[self.equation][3](points[:, 0], points[:, 1])[:, np.newaxis]

    def grid(self, points):
        """`points^2` points inside, as the error is measured on."""
        return _grid(self.equation, points)

    def call(self, inputs):
        """Rows `[t, x, a, b]` to residuals: `(batch, 4)` to `(batch, 1)`."""
        t, x, a, b = tf.unstack(inputs, axis=-1)  # not slices: XLA has no derivatives of their derivatives
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch((t, x))
                (u,) = tf.unstack(self.u(tf.stack([t, x], -1)), axis=-1)
            u_t, u_x = inner.gradient(u, (t, x))
        u_xx = outer.gradient(u_x, x)
        equation = u_t - CONDUCTIVITY * u_xx if self.equation == "heat" else u_t + u * u_x - VISCOSITY * u_xx
        return (a * equation + b * (u - EQUATIONS[self.equation][0] * tf.sin(np.pi * x)))[:, tf.newaxis]

    def get_config(self):
        return {**super().get_config(), "equation": self.equation, "widths": list(self.widths)}


def heat(points: int = 30, widths: tuple[int, ...] = (32,)) -> Problem:
    """The heat equation in one dimension, by a physics-informed network.

        u_t = 1/4 u_xx,    u(0, x) = sin(pi x),    u(t, 0) = u(t, 1) = 0,    u* = exp(-pi^2 t / 4) sin(pi x)

    for `t` and `x` in [0, 1]. The data are a grid of `points^2` points inside and `points` on each of three sides, so
    weighted that the loss is the mean square of the equation plus that of the data.

    Reference: Mueller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradients" (2023), which
    solve this equation with another network.

    Args:
        points: Points in each direction. Defaults to `30`.
        widths: Widths of the hidden layers. Defaults to `(32,)`.

    Returns:
        A `Problem`, for float64.

    Raises:
        ValueError: An argument is less than 1.

    Example: `problems.heat(points=20).model(seed=1)`
    """
    return _problem("heat", points, widths, _grid("heat", points))


def burgers(points: int = 40, widths: tuple[int, ...] = (20, 20, 20)) -> Problem:
    """Burgers' equation in one dimension, whose solution becomes steep at `x = 0`, by a physics-informed network.

        u_t + u u_x = 0.01 / pi u_xx,    u(0, x) = -sin(pi x),    u(t, -1) = u(t, 1) = 0

    for `t` in [0, 1] and `x` in [-1, 1]. The data are `points^2` scattered points inside, denser towards `x = 0`, and
    `points` on each of three sides. Their weights make the loss the mean square of the equation plus ten times that of
    the data.

    Reference: Raissi, Perdikaris and Karniadakis, "Physics-informed neural networks" (2019), appendix A, with another
    network and other points; the solution: Basdevant et al., "Spectral and finite difference solutions of the Burgers
    equation" (1986).

    Args:
        points: Points in each direction. Defaults to `40`.
        widths: Widths of the hidden layers. Defaults to `(20, 20, 20)`.

    Returns:
        A `Problem`, for float64.

    Raises:
        ValueError: An argument is less than 1.

    Example: `problems.burgers(points=50).model(seed=1)`
    """

    # a sequence of low discrepancy: between the lines of a grid a network can hide a jump
    count = points**2
    i = np.arange(count) + 0.5
    across = 2.0 * ((i * GOLDEN) % 1.0) - 1.0
    inside = np.stack([i / count, 0.2 * across + 0.8 * across**3], -1)
    return _problem("burgers", points, widths, inside, of_data=10.0)


def _problem(name, points, widths, inside, of_data=1.0):
    for argument, value in (("points", points), *(("widths", width) for width in widths)):
        if value < 1:
            raise ValueError(f"`{name}`: `{argument}` must be at least 1. Received: {argument}={value}")

    def layer():
        return DiffusionResiduals(name, widths, name="residuals")

    return of_residuals(name, layer, rows([(inside, 0, 1.0), (_sides(name, points), 1, of_data)], 2))


def _grid(equation, points):
    """The centres of cells, `(points^2, 2)`."""
    _, first, last, _ = EQUATIONS[equation]
    return centres((0.0, 1.0, points), (first, last - first, points))


def _sides(equation, points):
    """Points at the first moment and on both sides."""
    _, first, last, _ = EQUATIONS[equation]
    axis = np.linspace(0.0, 1.0, points)
    sides = [np.stack([0.0 * axis, first + (last - first) * axis], -1)]
    return np.concatenate(sides + [np.stack([axis, 0.0 * axis + end], -1) for end in (first, last)])
