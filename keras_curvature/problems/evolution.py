"""Three equations in space and time on which physics-informed networks are known to stall.

As in `residuals.py` one array of points is the whole problem. A row is `[x, t, a, b, c]`, and the output for it is

    a * (the equation at the point) + b * (u at the point minus the solution) + c * (the other condition at the point)

The other condition is that the solution is periodic in space, or for the wave that it begins at rest.
"""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.problems.base import Problem
from keras_curvature.problems.residuals import ResidualNetwork, centres, derivatives, of_residuals, rows, slopes


class Equation:
    """An equation in space and time, `0 < x < length` and `0 < t < 1`.

    Attributes:
        coefficient: The number that makes it hard.
        length: The length of the space.
        periodic: Whether the solution at both ends of the space is equal; else it is 0 there and begins at rest.
    """

    length, periodic = 2 * np.pi, True

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def residual(self, u: Callable[[tf.Tensor], tf.Tensor], points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`(u, residual of the equation, u_t)` of a function at points `(batch, 2)`, each `(batch, 1)`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `residual(u, points)`.")

    def solution(self, points: tf.Tensor) -> tf.Tensor:
        """The solution at points: `(batch, 1)`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `solution(points)`.")


class Convection(Equation):
    """`u_t + beta u_x = 0`, `u(x, 0) = sin(x)`; the solution is `sin(x - beta t)`."""

    def residual(self, u, points):
        value, first = slopes(u, points)
        return value, first[:, 1:] + self.coefficient * first[:, :1], first[:, 1:]

    def solution(self, points):
        return tf.sin(points[:, :1] - self.coefficient * points[:, 1:])


class Reaction(Equation):
    """`u_t = rho u (1 - u)`, `u(x, 0) = exp(-8 (x - pi)^2 / pi^2) = h`; `u = h e / (h e + 1 - h)`, `e = exp(rho t)`."""

    def residual(self, u, points):
        value, first = slopes(u, points)
        return value, first[:, 1:] - self.coefficient * value * (1.0 - value), first[:, 1:]

    def solution(self, points):
        h = tf.exp(-8.0 * ((points[:, :1] - np.pi) / np.pi) ** 2)
        grown = h * tf.exp(self.coefficient * points[:, 1:])
        return grown / (grown + 1.0 - h)


class Wave(Equation):
    """`u_tt = 4 u_xx`, from rest; `u = sin(pi x) cos(2 pi t) + 1/2 sin(beta pi x) cos(2 beta pi t)`."""

    length, periodic = 1.0, False

    def residual(self, u, points):
        value, first, second = derivatives(u, points)
        return value, second[:, 1:] - 4.0 * second[:, :1], first[:, 1:]

    def solution(self, points):
        x, t = np.pi * points[:, :1], 2.0 * np.pi * points[:, 1:]
        high = self.coefficient
        return tf.sin(x) * tf.cos(t) + 0.5 * tf.sin(high * x) * tf.cos(high * t)


EQUATIONS = {"convection": Convection, "reaction": Reaction, "wave": Wave}


@keras.saving.register_keras_serializable(package="keras_curvature")
class EvolutionResiduals(ResidualNetwork):
    """Residuals of an equation of `EQUATIONS`.

    Args:
        equation: Its name.
        coefficient: Its coefficient.
        width: Width of the hidden layers of the network `u`, tanh layers. Defaults to `200`.
        depth: Number of the hidden layers. Defaults to `3`.
        **options: Of `keras.layers.Layer`.
    """

    def __init__(self, equation, coefficient, width=200, depth=3, **options):
        super().__init__(**options)
        self.equation, self.coefficient, self.width, self.depth = equation, coefficient, width, depth
        self.pde = EQUATIONS[equation](coefficient)

    def build(self, input_shape):
        self.create_network(2, [self.width] * self.depth, kernel_initializer="glorot_normal")

    def solution(self, points):
        """The solution at points: `(batch, 1)`."""
        return self.pde.solution(points)

    def grid(self, points):
        """`points^2` points inside, as the error is measured on."""
        return centres((0.0, self.pde.length, points), (0.0, 1.0, points))

    def call(self, inputs):
        """Rows `[x, t, a, b, c]` to residuals: `(batch, 5)` to `(batch, 1)`."""
        points, a, b, c = inputs[:, :2], inputs[:, 2:3], inputs[:, 3:4], inputs[:, 4:]
        u, equation, speed = self.pde.residual(self.u, points)
        other = u - self.u(points + np.array([self.pde.length, 0.0])) if self.pde.periodic else speed
        return a * equation + b * (u - self.solution(points)) + c * other

    def get_config(self):
        own = {"equation": self.equation, "coefficient": self.coefficient, "width": self.width, "depth": self.depth}
        return {**super().get_config(), **own}


def convection(beta: float = 40.0, points: int = 10000, width: int = 200, depth: int = 3) -> Problem:
    """Convection in one dimension, periodic, with the network and points of the loss-landscape paper.

        u_t + beta u_x = 0,      u(x, 0) = sin(x),      u* = sin(x - beta t),      0 < x < 2 pi,  0 < t < 1

    The data are random points of the paper's grid of 255 x 100, 257 points where it begins and 101 on each end. Their
    weights make the loss the sum of the mean squares of each part.

    Reference: Rathore, Lei, Frangella, Lu and Udell, "Challenges in training PINNs: a loss landscape perspective"
    (2024), appendix A. Difference: (1) no factor 1/2.

    Args:
        beta: The speed. Defaults to `40.0` (the paper).
        points: Number of points inside, at most 25500. Defaults to `10000` (the paper).
        width: Width of the hidden layers. Defaults to `200` (the paper).
        depth: Number of hidden layers. Defaults to `3` (the paper).

    Returns:
        A `Problem`.

    Raises:
        ValueError: An argument is out of its range.

    Example: `problems.convection(points=1000, width=50).model(seed=1)`
    """
    return _problem("convection", beta, points, width, depth)


def reaction(rho: float = 5.0, points: int = 10000, width: int = 200, depth: int = 3) -> Problem:
    """Logistic growth at each point of a periodic space; otherwise as `convection`.

        u_t = rho u (1 - u),      u(x, 0) = exp(-8 (x - pi)^2 / pi^2) = h,      u* = h / (h + (1 - h) exp(-rho t))

    Args:
        rho: The rate of growth. Defaults to `5.0` (the paper).
        points: See `convection`. Defaults to `10000`.
        width: See `convection`. Defaults to `200`.
        depth: See `convection`. Defaults to `3`.

    Example: `problems.reaction(points=1000, width=50).model(seed=1)`
    """
    return _problem("reaction", rho, points, width, depth)


def wave(beta: float = 5.0, points: int = 10000, width: int = 200, depth: int = 3) -> Problem:
    """The wave equation in one dimension, from rest, 0 at both ends of `0 < x < 1`; otherwise as `convection`.

        u_tt = 4 u_xx,      u* = sin(pi x) cos(2 pi t) + 1/2 sin(beta pi x) cos(2 beta pi t)

    Args:
        beta: The higher frequency, an integer, so that the solution is 0 at both ends. Defaults to `5.0` (the paper).
        points: See `convection`. Defaults to `10000`.
        width: See `convection`. Defaults to `200`.
        depth: See `convection`. Defaults to `3`.

    Example: `problems.wave(points=1000, width=50).model(seed=1)`
    """
    return _problem("wave", beta, points, width, depth)


def _problem(name, coefficient, points, width, depth):
    for argument, value, most in (("points", points, 25500), ("width", width, None), ("depth", depth, None)):
        if value < 1 or (most is not None and value > most):
            allowed = "at least 1" if most is None else f"from 1 to {most}"
            raise ValueError(f"`{name}`: `{argument}` must be {allowed}. Received: {argument}={value}")

    def layer():
        return EvolutionResiduals(name, coefficient, width, depth, name="residuals")

    return of_residuals(name, layer, rows([(part, kind, 1.0) for part, kind in _parts(EQUATIONS[name], points)], 3))


def _parts(equation, points):
    """All points, and the number of the residual that each part has."""
    space, time = equation.length * np.arange(1, 256) / 256, np.arange(1, 101) / 100
    inside = np.stack(np.meshgrid(space, time, indexing="ij"), -1).reshape(-1, 2)
    inside = inside[np.random.RandomState(0).permutation(len(inside))[:points]]
    begin = np.stack([np.linspace(0.0, equation.length, 257), np.zeros(257)], -1)
    left = np.stack([np.zeros(101), np.linspace(0.0, 1.0, 101)], -1)
    if equation.periodic:
        return [(inside, 0), (begin, 1), (left, 2)]
    ends = np.concatenate([left, left + [equation.length, 0.0]])
    return [(inside, 0), (begin, 1), (ends, 1), (begin, 2)]
