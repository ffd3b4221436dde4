"""A task of LightBench as a Keras model: its weights are the task's, its output the loss of a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

LEVELS = ("trivial", "easy", "medium", "hard", "extreme", "nightmare")


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step of a run, with random draws that are a function of step and seed.

    Args:
        step: Number of the step, an int32 scalar; the first is 1.
        seed: Seed of the run, an integer.
    """

    step: tf.Tensor
    seed: int

    def time(self, dtype):
        """The number of the step in floating point."""
        return tf.cast(self.step, dtype)

    def normal(self, shape, dtype, stream=0):
        """Standard normal numbers of this step; each `stream` has its own."""
        return tf.random.stateless_normal(shape, [16 * self.seed + stream, self.step], dtype=dtype)

    def uniform(self, shape, dtype, stream=0, back=0):
        """Uniform numbers in [0, 1) of this step, or of the one `back` steps ago."""
        return tf.random.stateless_uniform(shape, [16 * self.seed + stream, self.step - back], dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of LightBench.

    Args:
        name: The key in `TASKS`.
        make: `make(knob, seed, dtype)` returns a built Keras layer that maps the number of a step, `(1, 1)`, to the
            loss, `(1, 1)`.
        reached: `reached(weights, loss, knob, seed)`: whether weights (NumPy arrays) and the loss of a step win.
        knobs: What makes the task harder, one number for each level of `LEVELS`. Defaults to one level, `trivial`.
        dtype: The float type of the weights. Defaults to `"float64"`.
        block: Steps after which the weights are looked at. Defaults to `256`.
        patience: The task's steps are so many times those of a budget. Defaults to `1`.
        can_be_won: Whether any weights win that the loss leads to. Defaults to `True`.
    """

    name: str
    make: Callable[..., keras.Layer]
    reached: Callable[..., bool]
    knobs: tuple[Any, ...] = (None,)
    dtype: str = "float64"
    block: int = 256
    patience: int = 1
    can_be_won: bool = True

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that it has, the easiest first."""
        return LEVELS[: len(self.knobs)]

    def knob(self, level: str) -> Any:
        """What `level` means for the task.

        Raises:
            ValueError: The task has no such level.
        """
        if level not in self.levels:
            raise ValueError(f"`{self.name}`: `level` must be one of {self.levels}. Received: level={level!r}")
        return self.knobs[self.levels.index(level)]

    def model(self, level: str = "trivial", seed: int = 0) -> keras.Model:
        """A new model, uncompiled; compile it with `loss=Output(dtype=task.dtype)` and pass it `steps(n)`.

        Args:
            level: One of `levels`. Defaults to `"trivial"`.
            seed: Determines the initial weights and the draws of every step. Defaults to `0`.
        """
        inputs = keras.Input((1,), dtype="int32")
        return keras.Model(inputs, self.make(self.knob(level), seed, self.dtype)(inputs), name=self.name)

    def won(self, model: keras.Model, level: str, loss: float, seed: int = 0) -> bool:
        """Whether a model of `model(level, seed)` has won, with its present weights and the loss of a step."""
        weights = [np.asarray(w) for w in model.get_weights()]
        return bool(self.reached(weights, loss, self.knob(level), seed))


@keras.saving.register_keras_serializable(package="keras_curvature")
class Output(keras.losses.Loss):
    """The mean of the output, whatever the target: the loss of models that compute their own."""

    def call(self, y_true, y_pred):
        return y_pred


def steps(count: int, start: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`(x, y)` for `count` steps in order: their numbers from `start` on, and targets that nothing reads."""
    return np.arange(start, start + count, dtype="int32")[:, np.newaxis], np.zeros((count, 1), "float32")


class Objective(keras.layers.Layer):
    """A function of weights and step as a layer.

    Args:
        start: Initial weights, NumPy arrays.
        loss: `loss(weights, moment, knob)`, a scalar.
        knob: See `Task`.
        seed: See `Task`.
        **options: Of `keras.layers.Layer`.
    """

    def __init__(self, start, loss, knob, seed, **options):
        super().__init__(**options)
        self.loss, self.knob, self.seed = loss, knob, seed
        for i, value in enumerate(start):
            self.add_weight(shape=value.shape, initializer=_fixed(value), name=f"weight_{i}")
        self.built = True

    def call(self, inputs):
        """The number of a step, `(1, 1)`, to the loss, `(1, 1)`."""
        weights = [tf.convert_to_tensor(w) for w in self.trainable_weights]
        return tf.reshape(self.loss(weights, Moment(inputs[0, 0], self.seed), self.knob), [1, 1])

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1)


def _fixed(value):
    return lambda shape, dtype: tf.constant(value, dtype)


def objective(start, loss):
    """`make` of a `Task`, from `start(knob, random)`, a list of arrays, and `loss(weights, moment, knob)`."""

    def make(knob, seed, dtype):
        return Objective(start(knob, np.random.default_rng(seed)), loss, knob, seed, dtype=dtype)

    return make


# What wins.


def below(largest):
    """A loss of at most `largest`."""
    return lambda weights, loss, knob, seed: loss <= largest


def near(distance, solution=lambda knob, seed: 0.0):
    """First weights whose distance from `solution(knob, seed)`, a root mean square, is less than `distance`."""

    def reached(weights, loss, knob, seed):
        return np.sqrt(np.mean(np.square(weights[0] - solution(knob, seed)))) < distance

    return reached
