"""Least-squares problems with known minimum and solution, as Keras models.

The loss is `SumSquares` of the residuals `phi(w)`, so that its Gauss-Newton matrix is `2 J' J`, as in the literature.
`quadratic` and `rosenbrock` give the residuals themselves, against targets of zero; their input is one number that
multiplies a residual, and a batch holds as many independent draws of the loss.
"""

import keras
import numpy as np
from keras import ops

from keras_curvature.problems.base import Problem, seeded
from keras_curvature.problems.losses import SumSquares
from keras_curvature.problems.table_1 import rosenbrock_start


def quadratic(dimension=20, condition=1e3, seed=0):
    """`f(w) = 1/2 (w - w*)' A (w - w*)`, eigenvalues of `A` log-spaced from 1 down to `1 / condition`.

    With `A = Q diag(l) Q'` the residuals are `phi = diag(l / 2)^(1/2) Q' (w - w*)`, linear in the weights:
    Hessian and Gauss-Newton matrix are both `A`, everywhere. Inputs are ones (samples, 1), targets zeros
    (samples, dimension).

    Args:
        dimension: number of weights.
        condition: largest eigenvalue over smallest.
        seed: determines the eigenvectors `Q` and the solution `w*`; `model(seed)` draws the start.
    """
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1. Received: dimension={dimension}")
    if condition < 1:
        raise ValueError(f"condition must be at least 1. Received: condition={condition}")

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


def rosenbrock(noise=0.0):
    """Rosenbrock's function of two weights, with the multiplicative noise of the CurveBall paper's Table 1.

    `f(u, v) = (1 - u)^2 + 100 eps^2 (v - u^2)^2`, residuals `phi = [10 eps (v - u^2), 1 - u]`. The input of
    the model is `eps`, (samples, 1), drawn from `noise * U[0, 1)`, or 1 where `noise` is 0. Targets are zeros
    (samples, 2). The table takes `noise` 0, 1 and 3, one draw for each iteration: batch size 1 and as many
    rows as iterations. Its text has `eps` where its code has `eps^2`; this is the code's (albanie/mcnToyOptim).
    `model(seed)` starts at `rosenbrock_start(seed)`.

    Args:
        noise: upper end of the uniform noise; 0 is the plain function.
    """
    if noise < 0:
        raise ValueError(f"noise is the upper end of a uniform distribution. Received: noise={noise}")

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


def rahimi_recht(seed=0):
    """A linear network with a superfluous layer: fit `W2 W1 x` to `A x`, x in R^6, everything else in R^10.

    `f(W1, W2) = mean_i |W2 W1 x_i - A x_i|^2` over 1000 samples `x_i ~ N(0, I)`, full batch. The rows of `A`,
    uniform in [0, 1), are scaled by `linspace(1, 1e-5, 10)`; the start is `W1 ~ N(0, (2/16)^2)` and
    `W2 ~ N(0, (1/10)^2)`. 100 of the 160 weights are superfluous: `(M W1, W2 M^-1)` has the loss of `(W1, W2)`. So the
    Hessian is singular at every solution. From Rahimi and Recht's 2017 talk, with the numbers of albanie/mcnToyOptim.
    The 1e-5 scales rows, linearly: the condition number of `A` is near 20.

    Args:
        seed: determines `A` and the samples; `model(seed)` draws the start.
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
    """`phi = x diag(l / 2)^(1/2) Q' (w - w*)`: (batch, 1) -> (batch, dimension). See `quadratic`."""

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
    """`phi = [10 x (v - u^2), 1 - u]` of the weights `w = [u, v]`: (batch, 1) -> (batch, 2). See
    `rosenbrock`."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(2,), initializer="zeros", name="w")

    def call(self, x):
        u, v = self.w[0], self.w[1]
        return ops.concatenate([10 * x * (v - ops.square(u)), (1 - u) * ops.ones_like(x)], axis=-1)


def _spectrum(dimension, condition, seed):
    """Eigenvalues (d,), eigenvectors in columns (d, d) and the solution (d,) of `quadratic`, float64."""
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
