"""The class `Problem`, and reproducible models.

A run is determined by its initial weights, its samples and its loss. A `Problem` holds one recipe for each, and nothing
is computed, read or allocated before a recipe runs. Recipes use Keras' current default float type: after
`keras.config.set_floatx("float64")` the same problem is a float64 problem.
"""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable

import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to minimise: a model, a loss and data, each made by calling its field.

    Args:
        name: the key in `PROBLEMS`.
        model: `model(seed=0)` makes a built, uncompiled `keras.Model`; equal seeds give equal weights.
        loss: `loss()` makes a `keras.losses.Loss`.
        data: `data(...)` gives arrays `(x, y)`, or `((x_train, y_train), (x_test, y_test))` where there is a
            test set.
        batch_size: the batch size of the source, or a sensible one.
        metrics: what to pass to `compile`.
        minimum: the minimum of the loss, if it is known.
        solution: `solution()` gives weights with that loss, float64 arrays in the order of `model.trainable_variables`.
        hessian: `hessian()` gives the Hessian of the loss if it is constant, float64, (weights, weights).
        stand_in: `stand_in(samples, seed)` gives synthetic `(x, y)` with the shapes of `data()`.
    """

    name: str
    model: Callable[..., keras.Model]
    loss: Callable[[], keras.losses.Loss]
    data: Callable[..., tuple]
    batch_size: int
    metrics: tuple = ()
    minimum: float | None = None
    solution: Callable[[], list[np.ndarray]] | None = None
    hessian: Callable[[], np.ndarray] | None = None
    stand_in: Callable[..., tuple] | None = None

    def compiled(self, optimizer, seed=0, **options):
        """A fresh model compiled with `optimizer`; `options` go to `keras.Model.compile`."""
        model = self.model(seed)
        model.compile(optimizer, loss=self.loss(), metrics=list(self.metrics), **options)
        return model

    def sample(self, samples, seed=0):
        """At most `samples` training rows `(x, y)`: the stand-in of `seed`, else the first of `data()`."""
        if self.stand_in is not None:
            return self.stand_in(samples, seed)
        parts = self.data()
        x, y = parts[0] if isinstance(parts[0], tuple) else parts
        return x[:samples], y[:samples]


def seeded(build):
    """Turn `build()`, which makes a model, into `model(seed=0)`: equal seeds, equal weights.

    The model has the type of `keras.config.floatx()`, and neither the seeds nor the types of anything built
    later change.
    """

    @functools.wraps(build)
    def model(seed=0):
        with _seed_of_layers(seed), _dtype_of_floatx():
            return build()

    return model


@contextlib.contextmanager
def _seed_of_layers(seed):
    """For a layer without a seed, Keras draws one from Python's `random`, and from nowhere else.

    With that generator seeded, the networks need no seed arguments. Integer seeds would also fail for
    `MultiHeadAttention`: its query, key and value kernels copy the initializer with its seed and would be equal.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _dtype_of_floatx():
    """Makes `set_floatx` count: Keras derives its default policy from `floatx()` once, at the first layer.

    A mixed-precision policy was chosen on purpose and stays.
    """
    policy = keras.config.dtype_policy()
    mixed = policy.compute_dtype != policy.variable_dtype
    keras.config.set_dtype_policy(policy if mixed else keras.config.floatx())
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
