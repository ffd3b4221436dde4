"""Nonlinear regressions: the 27 of NIST with certified values, and a curve of ten oscillations.

The data of NIST are those of its Statistical Reference Datasets (https://www.itl.nist.gov/div898/strd/), a work of the
United States government, read from the source distribution of `lmfit` 1.3.2 into `nist.npz`. The tests reproduce every
certified sum of squares from them.
"""

import functools
import math
import pathlib

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.problems.base import Problem, seeded


def _exponentials(x, *b):
    return sum(amplitude * tf.exp(-rate * x) for amplitude, rate in zip(b[::2], b[1::2]))


def _two_peaks(x, b1, b2, b3, b4, b5, b6, b7, b8):
    peak = lambda height, at, width: height * tf.exp(-tf.square((x - at) / width))  # noqa: E731
    return b1 * tf.exp(-b2 * x) + peak(b3, b4, b5) + peak(b6, b7, b8)


def _rational(x, top, bottom):
    return sum(b * x**k for k, b in enumerate(top)) / (1.0 + sum(b * x ** (k + 1) for k, b in enumerate(bottom)))


def _seasons(x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    wave = lambda period, c, s: c * tf.cos(2 * np.pi * x / period) + s * tf.sin(2 * np.pi * x / period)  # noqa: E731
    return b1 + wave(12.0, b2, b3) + wave(b4, b5, b6) + wave(b7, b8, b9)


# The curves as NIST writes them; `x` is `(batch, 1)`, of Nelson the two columns of its predictors.
CURVES = {
    "Bennett5": lambda x, b1, b2, b3: b1 * (b2 + x) ** (-1.0 / b3),
    "BoxBOD": lambda x, b1, b2: b1 * (1.0 - tf.exp(-b2 * x)),
    "Chwirut1": lambda x, b1, b2, b3: tf.exp(-b1 * x) / (b2 + b3 * x),
    "Chwirut2": lambda x, b1, b2, b3: tf.exp(-b1 * x) / (b2 + b3 * x),
    "DanWood": lambda x, b1, b2: b1 * x**b2,
    "ENSO": _seasons,
    "Eckerle4": lambda x, b1, b2, b3: b1 / b2 * tf.exp(-0.5 * tf.square((x - b3) / b2)),
    "Gauss1": _two_peaks, "Gauss2": _two_peaks, "Gauss3": _two_peaks,
    "Hahn1": lambda x, *b: _rational(x, b[:4], b[4:]),
    "Kirby2": lambda x, *b: _rational(x, b[:3], b[3:]),
    "Lanczos1": _exponentials, "Lanczos2": _exponentials, "Lanczos3": _exponentials,
    "MGH09": lambda x, b1, b2, b3, b4: b1 * (x * x + x * b2) / (x * x + x * b3 + b4),
    "MGH10": lambda x, b1, b2, b3: b1 * tf.exp(b2 / (x + b3)),
    "MGH17": lambda x, b1, b2, b3, b4, b5: b1 + b2 * tf.exp(-x * b4) + b3 * tf.exp(-x * b5),
    "Misra1a": lambda x, b1, b2: b1 * (1.0 - tf.exp(-b2 * x)),
    "Misra1b": lambda x, b1, b2: b1 * (1.0 - (1.0 + b2 * x / 2.0) ** -2.0),
    "Misra1c": lambda x, b1, b2: b1 * (1.0 - (1.0 + 2.0 * b2 * x) ** -0.5),
    "Misra1d": lambda x, b1, b2: b1 * b2 * x / (1.0 + b2 * x),
    "Nelson": lambda x, b1, b2, b3: b1 - b2 * x[:, :1] * tf.exp(-b3 * x[:, 1:]),
    "Rat42": lambda x, b1, b2, b3: b1 / (1.0 + tf.exp(b2 - b3 * x)),
    "Rat43": lambda x, b1, b2, b3, b4: b1 / (1.0 + tf.exp(b2 - b3 * x)) ** (1.0 / b4),
    "Roszman1": lambda x, b1, b2, b3, b4: b1 - b2 * x - tf.atan(b3 / (x - b4)) / np.pi,
    "Thurber": lambda x, *b: _rational(x, b[:4], b[4:]),
}  # fmt: skip


def nist(name: str) -> Problem:
    """A nonlinear regression of NIST's Statistical Reference Datasets, for float64.

    `model(seed=0)` starts at NIST's first start, far from the solution, and `model(seed=1)` at its second, near it.
    `solution()` has the certified weights, and `minimum` is the certified sum of squares over the number of
    observations. The response of Nelson is its logarithm, as in NIST's model.

    Args:
        name: One of `problems.regression.CURVES`.

    Returns:
        A `Problem`.

    Raises:
        ValueError: There is no regression of this name.

    Example: `problems.nist("Thurber").compiled(GaussNewton.levenberg_marquardt(), seed=1)`
    """
    if name not in CURVES:
        raise ValueError(f"`nist`: `name` must be one of {list(CURVES)}. Received: name={name!r}")
    stored = _stored()
    observed, starts = stored[f"{name}_data"], stored[f"{name}_starts"]

    def model(seed=0):
        made = seeded(lambda: _curve(name, observed.shape[1] - 1, starts.shape[1]))(seed)
        made.set_weights([starts[seed % 2]])
        return made

    def data():
        y, x = observed[:, :1], observed[:, 1:]
        y = np.log(y) if name == "Nelson" else y
        return x.astype(keras.config.floatx()), y.astype(keras.config.floatx())

    return Problem(
        name=f"nist_{name.lower()}", model=model, loss=keras.losses.MeanSquaredError, data=data,
        batch_size=len(observed), minimum=float(stored[f"{name}_rss"]) / len(observed),
        solution=lambda: [stored[f"{name}_certified"]],
    )  # fmt: skip


def sinc(samples: int = 20_000, width: int = 20) -> Problem:
    """The curve `sin(10 x) / (10 x)` on [-1, 1], and a network 1-20-1 with tanh: 61 weights.

    The protocol of tf-levenberg-marquardt has batches of 1000.

    Args:
        samples: Number of samples, evenly spaced. Defaults to `20_000`.
        width: Width of the hidden layer. Defaults to `20`.

    Returns:
        A `Problem`.

    Raises:
        ValueError: An argument is less than 1.

    Example: `x, y = problems.sinc(samples=1000).data()`
    """
    for name, value in (("samples", samples), ("width", width)):
        if value < 1:
            raise ValueError(f"`sinc`: `{name}` must be at least 1. Received: {name}={value}")

    @seeded
    def model():
        inputs = keras.Input((1,))
        hidden = keras.layers.Dense(width, activation="tanh")(inputs)
        return keras.Model(inputs, keras.layers.Dense(1)(hidden), name="sinc")

    def data():
        x = np.linspace(-1.0, 1.0, samples)[:, None]
        order = np.random.RandomState(0).permutation(samples)  # so that each batch covers the interval
        x = x[order].astype(keras.config.floatx())
        return x, np.sinc(10.0 / math.pi * x).astype(keras.config.floatx())

    return Problem(name="sinc", model=model, loss=keras.losses.MeanSquaredError, data=data, batch_size=1000)


@keras.saving.register_keras_serializable(package="keras_curvature")
class Curve(keras.layers.Layer):
    """A curve of NIST with weights `b`: `(batch, predictors)` to `(batch, 1)`."""

    def __init__(self, curve, weights, **options):
        super().__init__(**options)
        self.curve, self.count = curve, weights

    def build(self, input_shape):
        self.b = self.add_weight(shape=(self.count,), initializer="ones", name="b")

    def call(self, x):
        return CURVES[self.curve](x, *tf.unstack(tf.convert_to_tensor(self.b)))

    def get_config(self):
        return {**super().get_config(), "curve": self.curve, "weights": self.count}


def _curve(name, predictors, weights):
    inputs = keras.Input((predictors,))
    return keras.Model(inputs, Curve(name, weights)(inputs), name=f"nist_{name.lower()}")


@functools.cache
def _stored():
    with np.load(pathlib.Path(__file__).parent / "nist.npz") as stored:
        return {name: stored[name] for name in stored.files}
