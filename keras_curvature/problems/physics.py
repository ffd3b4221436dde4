"""Poisson's equation by a physics-informed network; see `residuals.py`."""

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.problems.base import Problem
from keras_curvature.problems.residuals import ResidualNetwork, centres, derivatives, of_residuals, rows


@keras.saving.register_keras_serializable(package="keras_curvature")
class PoissonResiduals(ResidualNetwork):
    """Residuals of `-laplace(u) = f` in the unit cube with `u = 0` on its boundary, for `u* = prod_i sin(pi x_i)`.

    Args:
        dimension: Number of coordinates. Defaults to `2`.
        width: Width of the hidden layer of the network `u`, a tanh layer. Defaults to `32`.
        stddev: Standard deviation of the initial weights. Defaults to `0.1`.
        **options: Of `keras.layers.Layer`.
    """

    def __init__(self, dimension=2, width=32, stddev=0.1, **options):
        super().__init__(**options)
        self.dimension, self.width, self.stddev = dimension, width, stddev

    def build(self, input_shape):
        normal = {"class_name": "RandomNormal", "config": {"stddev": self.stddev}}
        self.create_network(self.dimension, [self.width], kernel_initializer=normal, bias_initializer=normal)

    def solution(self, x):
        """`u*` at points: `(batch, 1)`."""
        return tf.reduce_prod(tf.sin(np.pi * x), -1, keepdims=True)

    def grid(self, points):
        """`points^dimension` points inside, as the error is measured on."""
        return centres(*[(0.0, 1.0, points)] * self.dimension)

    def call(self, inputs):
        """Rows `[x, a, b]` to residuals: `(batch, dimension + 2)` to `(batch, 1)`."""
        d = self.dimension
        x, a, b = inputs[:, :d], inputs[:, d : d + 1], inputs[:, d + 1 :]
        u, _, second = derivatives(self.u, x)  # (batch, 1), (batch, d), (batch, d)
        equation = tf.reduce_sum(second, -1, keepdims=True) + d * np.pi**2 * self.solution(x)
        return a * equation + b * (u - self.solution(x))

    def get_config(self):
        return {**super().get_config(), "dimension": self.dimension, "width": self.width, "stddev": self.stddev}


def poisson(dimension: int = 2, points: int = 30, width: int = 32) -> Problem:
    """Poisson's equation in the unit square or cube, with the network and grid of the energy natural gradients.

        -laplace(u) = d pi^2 prod_i sin(pi x_i),      u = 0 on the boundary,      u* = prod_i sin(pi x_i)

    The data are `points^d` points inside, and `points` on each side of the square (in more dimensions `points^2` random
    points on the boundary). Their weights make the loss the mean square of the equation plus that of the boundary. For
    float64: `keras.config.set_floatx("float64")`.

    Reference: Mueller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradients" (2023), section
    4.1, and its code `engd_poisson_2d.py`.

    Args:
        dimension: Number of coordinates. Defaults to `2`.
        points: Points in each direction. Defaults to `30` (the paper).
        width: Width of the network's hidden layer. Defaults to `32` (the paper).

    Returns:
        A `Problem`.

    Raises:
        ValueError: An argument is less than 1.

    Example: `problems.poisson(points=20).model(seed=1)`
    """
    for name, value in (("dimension", dimension), ("points", points), ("width", width)):
        if value < 1:
            raise ValueError(f"`poisson`: `{name}` must be at least 1. Received: {name}={value}")

    inside, boundary = centres(*[(0.0, 1.0, points)] * dimension), _boundary(dimension, points)

    def layer():
        return PoissonResiduals(dimension, width, name="residuals")

    return of_residuals(f"poisson_{dimension}d", layer, rows([(inside, 0, 1.0), (boundary, 1, 1.0)], 2))


def _boundary(dimension, points):
    """Points on the sides; in the square `points` on each, with the corners."""
    if dimension == 1:
        return np.array([[0.0], [1.0]])
    if dimension > 2:
        random = np.random.RandomState(0)
        x = random.rand(points**2, dimension)
        x[np.arange(points**2), random.randint(dimension, size=points**2)] = random.randint(2, size=points**2)
        return x
    axis = np.linspace(0.0, 1.0, points)
    sides = [np.stack(pair, -1) for end in (0.0, 1.0) for pair in ((axis, 0 * axis + end), (0 * axis + end, axis))]
    return np.concatenate(sides)
