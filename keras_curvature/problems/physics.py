"""Physics-informed networks, as Keras layers whose outputs are residuals.

A point of the domain is a row `[coordinates, a, b]` of the input, and the output for it is

    a * (the equation at the point) + b * (u at the point minus its data)

with `b = 0` inside of the domain, and `a = 0` on its boundary. So with `loss="mse"` and targets of zero, one array of
points is the whole problem, batches and replicas may cut it as they like, and `a` and `b` hold the weights of the two
parts. Derivatives in the coordinates are taken inside `call`.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.problems.base import Problem, seeded


@keras.saving.register_keras_serializable(package="keras_curvature")
class PoissonResiduals(keras.layers.Layer):
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
        normal = lambda: keras.initializers.RandomNormal(stddev=self.stddev)  # noqa: E731
        self.hidden = keras.layers.Dense(
            self.width, activation="tanh", kernel_initializer=normal(), bias_initializer=normal(), name="hidden"
        )
        self.head = keras.layers.Dense(1, kernel_initializer=normal(), bias_initializer=normal(), name="head")
        self.hidden.build((None, self.dimension))
        self.head.build((None, self.width))

    def u(self, x):
        """The network at points `(batch, dimension)`: `(batch, 1)`."""
        return self.head(self.hidden(x))

    def solution(self, x):
        """`u*` at points: `(batch, 1)`."""
        return tf.reduce_prod(tf.sin(np.pi * x), -1, keepdims=True)

    def grid(self, points):
        """`points^dimension` points inside, as the error is measured on."""
        return _inside(self.dimension, points)

    def call(self, inputs):
        """Rows `[x, a, b]` to residuals: `(batch, dimension + 2)` to `(batch, 1)`."""
        d = self.dimension
        x, a, b = inputs[:, :d], inputs[:, d : d + 1], inputs[:, d + 1 :]
        u, _, second = derivatives(self.u, x)  # (batch, 1), (batch, d), (batch, d)
        equation = tf.reduce_sum(second, -1, keepdims=True) + d * np.pi**2 * self.solution(x)
        return a * equation + b * (u - self.solution(x))

    def get_config(self):
        return {**super().get_config(), "dimension": self.dimension, "width": self.width, "stddev": self.stddev}


def slopes(u, x):
    """`(u, first)` derivatives of a function of points; see `derivatives`."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = u(x)
    return value, tape.gradient(value, x)


def derivatives(u, x):
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


def poisson(dimension: int = 2, points: int = 30, width: int = 32) -> Problem:
    """Poisson's equation in the unit square or cube, with the network and grid of the energy natural gradients.

        -laplace(u) = d pi^2 prod_i sin(pi x_i),      u = 0 on the boundary,      u* = prod_i sin(pi x_i)

    The data are `points^d` points inside, and `points` on each side of the square (in more dimensions `points^2` random
    points on the boundary), so weighted that the loss is the mean square of the equation plus that of the boundary. For
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

    @seeded
    def model():
        inputs = keras.Input((dimension + 2,))
        residuals = PoissonResiduals(dimension, width, name="residuals")
        return keras.Model(inputs, residuals(inputs), name=f"poisson_{dimension}d")

    def data():
        x = _rows(_inside(dimension, points), _boundary(dimension, points))
        return x.astype(keras.config.floatx()), np.zeros((len(x), 1), keras.config.floatx())

    return Problem(
        name=f"poisson_{dimension}d", model=model, loss=keras.losses.MeanSquaredError, data=data,
        batch_size=len(_inside(dimension, points)) + len(_boundary(dimension, points)), minimum=0.0,
    )  # fmt: skip


def relative_error(model: keras.Model, points: int = 100) -> float:
    """The error of a model of `poisson`, `convection`, `reaction` or `wave` in L2, relative to the solution.

    Args:
        model: The model.
        points: Points in each direction of a grid inside the domain. Defaults to `100`.
    """
    residuals = model.get_layer("residuals")
    x = tf.constant(residuals.grid(points), residuals.compute_dtype)
    u, solution = residuals.u(x), residuals.solution(x)
    return float(tf.norm(u - solution) / tf.norm(solution))


def _inside(dimension, points):
    """A grid of cell centres, `(points^dimension, dimension)`."""
    axis = (np.arange(points) + 0.5) / points
    return np.stack(np.meshgrid(*[axis] * dimension, indexing="ij"), -1).reshape(-1, dimension)


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


def _rows(inside, boundary):
    """Points with their weights: the mean of all squares is the mean of the inner ones plus that of the others."""
    total = len(inside) + len(boundary)
    a, b = np.sqrt(total / len(inside)), np.sqrt(total / len(boundary))
    return np.concatenate([
        np.pad(np.pad(inside, ((0, 0), (0, 1)), constant_values=a), ((0, 0), (0, 1))),
        np.pad(np.pad(boundary, ((0, 0), (0, 1))), ((0, 0), (0, 1)), constant_values=b),
    ])  # fmt: skip
