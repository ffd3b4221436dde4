"""The class `Problem`, and reproducible models.

A run is determined by its initial weights, its samples and its loss. A `Problem` has a function for each, and nothing
is computed, read or allocated before the function is called. The functions use Keras' current default float type: after
`keras.config.set_floatx("float64")` the same problem is in float64.
"""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """A training problem: functions that return a model, a loss and data.

    Args:
        name: The key in `PROBLEMS`.
        model: `model(seed=0)` returns a built, uncompiled `keras.Model`; equal seeds give equal weights.
        loss: `loss()` returns a `keras.losses.Loss`.
        data: `data(...)` returns arrays `(x, y)`, or `((x_train, y_train), (x_test, y_test))` if there is a test set.
        batch_size: The batch size of the source, or a sensible one.
        metrics: The metrics for `compile`. Defaults to `()`.
        minimum: The minimum of the loss; `None`: unknown. Defaults to `None`.
        solution: `solution()` returns weights with this loss, float64 arrays in the order of
            `model.trainable_variables`; `None`: unknown. Defaults to `None`.
        hessian: `hessian()` returns the Hessian of the loss, float64 `(weights, weights)`; `None`: it is not constant.
            Defaults to `None`.
        stand_in: `stand_in(samples, seed)` returns synthetic `(x, y)` of the shapes of `data()`; `None`: `data()` needs
            no download. Defaults to `None`.

    Example:

    ```python
    problem = problems.get("mnist_mlp")
    model = keras_curvature.curved(problem.compiled(keras_curvature.CurveBall(), seed=1))
    x, y = problem.sample(1024)
    model.fit(x, y, batch_size=problem.batch_size)
    ```
    """

    name: str
    model: Callable[..., keras.Model]
    loss: Callable[[], keras.losses.Loss]
    data: Callable[..., tuple[Any, Any]]
    batch_size: int
    metrics: tuple[Any, ...] = ()
    minimum: float | None = None
    solution: Callable[[], list[np.ndarray]] | None = None
    hessian: Callable[[], np.ndarray] | None = None
    stand_in: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None

    def compiled(self, optimizer: keras.Optimizer | str, seed: int = 0, **options: Any) -> keras.Model:
        """A new model compiled with `optimizer`; `options` are passed to `keras.Model.compile`."""
        model = self.model(seed)
        model.compile(optimizer, loss=self.loss(), metrics=list(self.metrics), **options)
        return model

    def sample(self, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """At most `samples` training examples `(x, y)`: from `stand_in` if there is one, else the first of `data()`."""
        if self.stand_in is not None:
            return self.stand_in(samples, seed)
        parts = self.data()
        x, y = parts[0] if isinstance(parts[0], tuple) else parts
        return x[:samples], y[:samples]


def seeded(build: Callable[[], keras.Model]) -> Callable[..., keras.Model]:
    """Turn `build()`, which returns a model, into `model(seed=0)`: equal seeds give equal weights.

    The model has the dtype `keras.config.floatx()`. Seeds and dtypes of anything built later do not change.

    Example: `model = problems.seeded(lambda: keras.Sequential([...]))(seed=3)`
    """

    @functools.wraps(build)
    def model(seed=0):
        with _seed_of_layers(seed), _dtype_of_floatx():
            return build()

    return model


@contextlib.contextmanager
def _seed_of_layers(seed):
    """Seed Python's `random`, from which Keras draws the seed of a layer that has none.

    So the networks need no seed arguments. Integer seeds would be wrong for `MultiHeadAttention`: its query, key and
    value kernels copy the initializer with its seed and would be equal.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _dtype_of_floatx():
    """Set the dtype policy to the current `floatx()`, which Keras reads only once, at the first layer.

    A mixed-precision policy is kept.
    """
    policy = keras.config.dtype_policy()
    mixed = policy.compute_dtype != policy.variable_dtype
    keras.config.set_dtype_policy(policy if mixed else keras.config.floatx())
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
