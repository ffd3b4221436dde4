"""Parity of bits, by recurrent networks. The initial weights have the distributions of torch's layers."""

import keras
import tensorflow as tf
from keras import layers

from keras_curvature.problems.base import seeded
from keras_curvature.problems.lightbench.task import Moment, Task, below

BATCH = 256
CELLS = {"": layers.LSTM, "_rnn": layers.SimpleRNN}


class Parity(keras.layers.Layer):
    """The mean binary cross-entropy of a network on the bits of a step.

    Args:
        draw: `draw(moment, length)` returns tokens, `(256, ...)` integers, and targets `(256, ...)`.
        network: A Keras model of the tokens that gives a logit for each target.
        length: Number of bits.
        seed: Of the draws.
        **options: Of `keras.layers.Layer`.
    """

    def __init__(self, draw, network, length, seed, **options):
        super().__init__(**options)
        self.draw, self.network, self.length, self.seed = draw, network, length, seed
        self.built = True

    def call(self, inputs):
        """The number of a step, `(1, 1)`, to the loss, `(1, 1)`."""
        tokens, targets = self.draw(Moment(inputs[0, 0], self.seed), self.length)
        logits = self.network(tokens)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(targets, logits.dtype), logits)
        return tf.reshape(tf.reduce_mean(losses), [1, 1])

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1)


def bits(moment, shape, stream=0):
    """Zeros and ones, integers."""
    return tf.cast(moment.uniform(shape, "float32", stream) < 0.5, tf.int32)


def _digits(moment, length):
    drawn = bits(moment, [BATCH, length])
    return drawn, tf.reduce_sum(drawn, 1, keepdims=True) % 2


def _spots(moment, length):
    """Bits and marks; 512 columns are marked, of all examples together, as in the original."""
    drawn = bits(moment, [BATCH, length])
    columns = tf.cast(moment.uniform([2 * BATCH], "float32", stream=1) * length, tf.int32)
    marks = tf.reduce_max(tf.one_hot(columns, length, dtype=tf.int32), 0) * tf.ones([BATCH, 1], tf.int32)
    return tf.stack([drawn, marks + 2], 1), tf.reduce_sum(drawn * marks, 1, keepdims=True) % 2


def _sequences(moment, length):
    first, second = bits(moment, [BATCH, length]), bits(moment, [BATCH, length], stream=1)
    return tf.stack([first, second], 1), ((first + second) % 2)[..., tf.newaxis]


def _embedding(tokens, size):
    return layers.Embedding(tokens, size, embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0))


def _uniform(size):
    bound = size**-0.5
    return keras.initializers.RandomUniform(-bound, bound)


def _recurrent(cell, size, **options):
    drawn = {"kernel_initializer": _uniform(size), "recurrent_initializer": _uniform(size)}
    drawn["bias_initializer"] = _uniform(size)
    if cell is layers.LSTM:
        drawn["unit_forget_bias"] = False
    return cell(size, **drawn, **options)


def _logits(x, size):
    dense = layers.Dense(1, kernel_initializer=_uniform(size), bias_initializer=_uniform(size))
    return dense(layers.LayerNormalization(epsilon=1e-5)(x))


def _digit_network(cell, length, size=64):
    inputs = keras.Input((length,), dtype="int32")
    return keras.Model(inputs, _logits(_recurrent(cell, size)(_embedding(2, size)(inputs)), size))


def _spot_network(cell, length, size=64):
    inputs = keras.Input((2, length), dtype="int32")
    embedded = _embedding(4, size)(inputs)
    return keras.Model(inputs, _logits(_recurrent(cell, size)(embedded[:, 0] + embedded[:, 1]), size))


def _sequence_network(cell, length, size=16):
    inputs = keras.Input((2, length), dtype="int32")
    first, second = _embedding(2, size)(inputs[:, 0]), _embedding(2, size)(inputs[:, 1])
    _, *state = _recurrent(cell, size, return_state=True)(first)
    decoded = _recurrent(cell, size, return_sequences=True)(second, initial_state=state)
    return keras.Model(inputs, _logits(decoded, size))


def _task(name, network, draw, largest, lengths):
    def make(length, seed, dtype, cell):
        build = seeded(lambda: network(cell, length))
        return Parity(draw, build(seed), length, seed, dtype=dtype)

    return [
        Task(
            name + ending, lambda length, seed, dtype, cell=cell: make(length, seed, dtype, cell), below(largest),
            lengths, dtype="float32",
        )
        for ending, cell in CELLS.items()
    ]  # fmt: skip


PARITY = [
    *_task("xor_digit", _digit_network, _digits, 1e-3, (4, 8, 16, 32, 64, 96)),
    *_task("xor_spot", _spot_network, _spots, 1e-2, (4, 8, 16, 32, 64, 96)),
    *_task("xor_sequence", _sequence_network, _sequences, 1e-2, (2, 4, 6, 9, 12, 14)),
]
