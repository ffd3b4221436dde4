"""Physics-informed networks, as Keras layers whose outputs are residuals.

A point of the domain is a row `[coordinates, a, b, ...]` of the input, and the output for it is

    a * (the equation at the point) + b * (u at the point minus its data) + ...

with `b = 0` inside of the domain, and `a = 0` on its boundary. So with `loss="mse"` and targets of zero, one array of
points is the whole problem, batches and replicas may cut it as they like, and `a` and `b` hold the weights of the
parts. Derivatives in the coordinates are taken inside `call`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.problems.base import Problem, seeded


class ResidualNetwork(keras.layers.Layer):
    """A network `u` of points with tanh layers, and the residuals of its equation, which subclasses write in `call`."""

    def create_network(self, coordinates: int, widths: Sequence[int], **initializers: Any) -> None:
        """Create and build the layers; `initializers` are arguments of each `Dense`."""
        self.hidden = [
            keras.layers.Dense(n, "tanh", name=f"hidden_{i}", **initializers) for i, n in enumerate(widths)
        ]  # fmt: skip
        self.head = keras.layers.Dense(1, name="head", **initializers)
        for layer, size in zip([*self.hidden, self.head], [coordinates, *widths], strict=True):
            layer.build((None, size))

    def u(self, points: tf.Tensor) -> tf.Tensor:
        """The network at points `(batch, coordinates)`: `(batch, 1)`."""
        for layer in self.hidden:
            points = layer(points)
        return self.head(points)

    def solution(self, points: tf.Tensor) -> tf.Tensor | np.ndarray:
        """The solution at points: `(batch, 1)`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `solution(points)`.")

    def grid(self, points: int) -> np.ndarray:
        """Points inside, `points` in each direction, as the error is measured on."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `grid(points)`.")


def slopes(u: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`(u, first)` derivatives of a function of points; see `derivatives`."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = u(x)
    return value, tape.gradient(value, x)


def derivatives(u: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`(u, first, second)` derivatives of a function of points in each coordinate.

    Args:
        u: A function of points `(batch, d)` to `(batch, 1)`, each of its own point.
        x: The points.

    Returns:
        Tensors of shapes `(batch, 1)`, `(batch, d)` and `(batch, d)`.
    """
    columns = tf.unstack(x, axis=-1)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(columns)
        points = tf.stack(columns, -1)
        with tf.GradientTape() as inner:
            inner.watch(points)
            value = u(points)
        first = inner.gradient(value, points)
        parts = tf.unstack(first, axis=-1)
    second = [outer.gradient(part, column) for part, column in zip(parts, columns)]
    return value, first, tf.stack(second, -1)


def centres(*axes: tuple[float, float, int]) -> np.ndarray:
    """The centres of the cells of a grid, for the begin, the length and the number of cells of each axis."""
    lines = [begin + length * (np.arange(count) + 0.5) / count for begin, length, count in axes]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(axes))


def rows(parts: Sequence[tuple[np.ndarray, int, float]], kinds: int) -> np.ndarray:
    """Points with `a`, `b`, ...: the mean of all squares is the weighted sum of the mean squares of each part.

    Args:
        parts: `(points, number of the residual, weight)` of each part.
        kinds: Number of residuals.
    """
    total = sum(len(points) for points, _, _ in parts)
    return np.concatenate([
        np.hstack([points, np.sqrt(weight * total / len(points)) * np.eye(kinds)[[kind] * len(points)]])
        for points, kind, weight in parts
    ])  # fmt: skip


def of_residuals(name: str, layer: Callable[[], ResidualNetwork], x: np.ndarray) -> Problem:
    """The least squares of a layer's residuals on the rows `x`."""

    @seeded
    def model():
        inputs = keras.Input(x.shape[1:])
        return keras.Model(inputs, layer()(inputs), name=name)

    def data():
        return x.astype(keras.config.floatx()), np.zeros((len(x), 1), keras.config.floatx())

    return Problem(
        name=name, model=model, loss=keras.losses.MeanSquaredError, data=data, batch_size=len(x), minimum=0.0
    )  # fmt: skip


def relative_error(model: keras.Model, points: int = 100) -> float:
    """The error in L2 of a model of a differential equation, relative to the solution.

    Args:
        model: The model of `poisson`, `heat`, `burgers`, `convection`, `reaction` or `wave`.
        points: Points in each direction of a grid inside the domain. Defaults to `100`.
    """
    residuals = model.get_layer("residuals")
    x = tf.constant(residuals.grid(points), residuals.compute_dtype)
    u, solution = np.asarray(residuals.u(x)), np.asarray(residuals.solution(x))
    return float(np.linalg.norm(u - solution) / np.linalg.norm(solution))
