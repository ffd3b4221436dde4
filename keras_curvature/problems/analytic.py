"""Least-squares problems with known minimum and solution, as Keras models.

The loss is `SumSquares` of the residuals `phi(w)`, so its Gauss-Newton matrix is `2 J' J`, as in the literature. The
models of `quadratic` and `rosenbrock` return the residuals, and the targets are zero. Their input is one number that
multiplies a residual, so each sample of a batch is a draw of the loss.
"""

import keras
import numpy as np
from keras import ops

from keras_curvature.problems.base import Problem, seeded
from keras_curvature.problems.losses import SumSquares
from keras_curvature.problems.table_1 import rosenbrock_start


def quadratic(dimension: int = 20, condition: float = 1e3, seed: int = 0) -> Problem:
    """A quadratic `f(w) = 1/2 (w - w*)' A (w - w*)`, eigenvalues of `A` log-spaced from 1 to `1 / condition`.

    With `A = Q diag(l) Q'` the residuals are `phi = diag(l / 2)^(1/2) Q' (w - w*)`, which are linear in the weights, so
    the Hessian and the Gauss-Newton matrix are both `A`. The inputs are ones, `(samples, 1)`, and the targets zeros,
    `(samples, dimension)`.

    Args:
        dimension: Number of weights. Defaults to `20`.
        condition: Condition number of `A`. Defaults to `1e3`.
        seed: Determines the eigenvectors `Q` and the solution `w*`; `model(seed)` draws the start. Defaults to `0`.

    Returns:
        A `Problem`.

    Raises:
        ValueError: `dimension` or `condition` is less than 1.

    Example: `problems.quadratic(dimension=100, condition=1e4).hessian()`
    """
    if dimension < 1:
        raise ValueError(f"`quadratic`: `dimension` must be at least 1. Received: dimension={dimension}")
    if condition < 1:
        raise ValueError(f"`quadratic`: `condition` must be at least 1. Received: condition={condition}")

    @seeded
    def model():
        residuals = QuadraticResiduals(int(dimension), float(condition), int(seed))
        return _one_layer((1,), residuals, "quadratic")

    def hessian():
        eigenvalues, eigenvectors, _ = _spectrum(dimension, condition, seed)
        return (eigenvectors * eigenvalues) @ eigenvectors.T

    return Problem(
        name="quadratic",
        model=model,
        loss=SumSquares,
        data=lambda samples=100: (_ones(samples), _zeros(samples, dimension)),
        batch_size=1,
        minimum=0.0,
        solution=lambda: [_spectrum(dimension, condition, seed)[2]],
        hessian=hessian,
    )


def rosenbrock(noise: float = 0.0) -> Problem:
    """Rosenbrock's function of two weights, with the multiplicative noise of the CurveBall paper's Table 1.

        f(u, v) = (1 - u)^2 + 100 eps^2 (v - u^2)^2

    with the residuals `phi = [10 eps (v - u^2), 1 - u]`. The input of the model is `eps`, `(samples, 1)`, drawn from
    `noise * U[0, 1)`, or 1 if `noise` is 0. The targets are zeros, `(samples, 2)`. The table has `noise` 0, 1 and 3
    and one draw for each iteration: batch size 1, and as many samples as iterations. `model(seed)` starts at
    `rosenbrock_start(seed)`.

    Reference: Henriques et al. (2018), arXiv:1805.08095, Table 1, and albanie/mcnToyOptim. The text of the paper has
    `eps` where the code has `eps^2`; this function is the code's.

    Args:
        noise: Upper end of the uniform noise; `0.0`: the plain function. Defaults to `0.0`.

    Returns:
        A `Problem`.

    Raises:
        ValueError: `noise` is negative.

    Example: `x, y = problems.rosenbrock(noise=1).data(samples=5000)`
    """
    if noise < 0:
        raise ValueError(f"`rosenbrock`: `noise` must be at least 0. Received: noise={noise}")

    def model(seed=0):
        made = seeded(lambda: _one_layer((1,), RosenbrockResiduals(), "rosenbrock"))(seed)
        made.set_weights([rosenbrock_start(seed)])
        return made

    def data(samples=5000, seed=0):
        draws = noise * np.random.RandomState(seed).rand(samples, 1) if noise else _ones(samples)
        return draws.astype(keras.config.floatx()), _zeros(samples, 2)

    return Problem(
        name=f"rosenbrock_noise_{noise:g}" if noise else "rosenbrock",
        model=model,
        loss=SumSquares,
        data=data,
        batch_size=1,
        minimum=0.0,
        solution=lambda: [np.ones(2)],
    )


def rahimi_recht(seed: int = 0) -> Problem:
    """A linear network with two layers that learns a linear map `A` from R^6 to R^10.

        f(W1, W2) = mean_i |W2 W1 x_i - A x_i|^2

    over 1000 samples `x_i ~ N(0, I)`, full batch, with `W1` `(10, 6)` and `W2` `(10, 10)`. The rows of `A`, uniform in
    [0, 1), are scaled by `linspace(1, 1e-5, 10)`; the scale is linear, so the condition number of `A` is near 20. The
    start is `W1 ~ N(0, (2/16)^2)` and `W2 ~ N(0, (1/10)^2)`. 100 of the 160 weights are redundant: for every
    invertible `M`, `(M W1, W2 M^-1)` has the same loss. So the Hessian is singular at every solution.

    Reference: Rahimi and Recht's 2017 talk, with the numbers of albanie/mcnToyOptim.

    Args:
        seed: Determines `A` and the samples; `model(seed)` draws the start. Defaults to `0`.

    Returns:
        A `Problem`.

    Example: `problems.rahimi_recht().solution()`
    """

    @seeded
    def model():
        normal = keras.initializers.RandomNormal
        first = keras.layers.Dense(10, use_bias=False, kernel_initializer=normal(stddev=2 / 16), name="first")
        second = keras.layers.Dense(
            10, use_bias=False, kernel_initializer=normal(stddev=1 / 10), name="second"
        )
        inputs = keras.Input((6,))
        return keras.Model(inputs, second(first(inputs)), name="rahimi_recht")

    def matrix_and_samples():
        random = np.random.RandomState(seed)
        samples = random.randn(1000, 6)
        return np.linspace(1, 1e-5, 10)[:, None] * random.rand(10, 6), samples  # (10, 6), (1000, 6)

    def data():
        A, x = matrix_and_samples()
        return x.astype(keras.config.floatx()), (x @ A.T).astype(keras.config.floatx())

    def solution():
        A, _ = matrix_and_samples()
        return [np.eye(6, 10), np.vstack([A.T, np.zeros((4, 10))])]  # (6, 10), (10, 10): their product is A'

    return Problem(
        name="rahimi_recht",
        model=model,
        loss=SumSquares,
        data=data,
        batch_size=1000,
        minimum=0.0,
        solution=solution,
    )


@keras.saving.register_keras_serializable(package="keras_curvature")
class QuadraticResiduals(keras.layers.Layer):
    """The residuals of `quadratic`, `phi = x diag(l / 2)^(1/2) Q' (w - w*)`: (batch, 1) -> (batch, dimension)."""

    def __init__(self, dimension, condition, seed, **options):
        super().__init__(**options)
        self.dimension, self.condition, self.seed = dimension, condition, seed

    def build(self, input_shape):
        normal = keras.initializers.RandomNormal(stddev=1.0)
        self.w = self.add_weight(shape=(self.dimension,), initializer=normal, name="w")
        eigenvalues, eigenvectors, self.solution = _spectrum(self.dimension, self.condition, self.seed)
        self.root = np.sqrt(eigenvalues / 2)[:, None] * eigenvectors.T  # (dimension, dimension)

    def call(self, x):
        distance = self.w - ops.cast(self.solution, self.compute_dtype)
        return x * ops.matmul(ops.cast(self.root, self.compute_dtype), distance)


@keras.saving.register_keras_serializable(package="keras_curvature")
class RosenbrockResiduals(keras.layers.Layer):
    """The residuals of `rosenbrock`, `phi = [10 x (v - u^2), 1 - u]` with `w = [u, v]`: (batch, 1) -> (batch, 2)."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(2,), initializer="zeros", name="w")

    def call(self, x):
        u, v = self.w[0], self.w[1]
        return ops.concatenate([10 * x * (v - ops.square(u)), (1 - u) * ops.ones_like(x)], axis=-1)


def _spectrum(dimension, condition, seed):
    """Eigenvalues (d,), eigenvectors as columns (d, d) and the solution (d,) of `quadratic`, in float64."""
    random = np.random.RandomState(seed)
    eigenvectors, _ = np.linalg.qr(random.randn(dimension, dimension))
    return np.logspace(0, -np.log10(condition), dimension), eigenvectors, random.randn(dimension)


def _one_layer(shape, layer, name):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs), name=name)


def _ones(samples):
    return np.ones((samples, 1), keras.config.floatx())


def _zeros(samples, outputs):
    return np.zeros((samples, outputs), keras.config.floatx())
