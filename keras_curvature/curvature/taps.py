"""Taps: what single layers saw and said during a forward pass.

A tap is opened around a whole evaluation, on all replicas at once, and notes under the key of each replica. It
replaces a method of a Keras layer class while it is open; the layers compute what they always compute.
"""

import contextlib
import dataclasses

import keras
import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.curvature.differentiable import replaced


@dataclasses.dataclass(frozen=True)
class DenseTap:
    """One call of a `Dense` layer: `inputs` `(..., d_in)` and `said`, the pre-activation, `(..., d_out)`."""

    layer: keras.layers.Dense
    inputs: tf.Tensor
    said: tf.Tensor


@contextlib.contextmanager
def dense():
    """Note every call of a `Dense` layer; yields `{replica: [DenseTap]}`."""
    noted = {}
    original = keras.layers.Dense.call

    def call(layer, inputs, *args, **kwargs):
        activation = layer.activation
        object.__setattr__(layer, "activation", None)  # past Keras' attribute tracking, which is locked by now
        try:
            said = tf.identity(original(layer, inputs, *args, **kwargs))
        finally:
            object.__setattr__(layer, "activation", activation)
        noted.setdefault(replicas.identity(), []).append(DenseTap(layer, inputs, said))
        return said if activation is None else activation(said)

    with replaced((keras.layers.Dense, "call", call)):
        yield noted


@contextlib.contextmanager
def hidden_states(noted=None):
    """Note the output sequence of every recurrent layer, whole even where only the last is returned.

    Yields `{replica: [sequence]}`, each sequence `(batch, time, units)`; it is `noted`, where that is given.
    """
    noted = {} if noted is None else noted
    with contextlib.ExitStack() as stack:
        for cls in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU):
            stack.enter_context(replaced((cls, "inner_loop", _whole_sequence(cls.inner_loop, noted))))
        yield noted


def _whole_sequence(original, noted):
    def inner_loop(layer, *args, **kwargs):
        if layer.return_sequences:
            last, sequence, states = original(layer, *args, **kwargs)
        else:
            object.__setattr__(layer, "return_sequences", True)
            try:
                # LSTM and GRU call the RNN's own loop from theirs: return_sequences now holds, so it notes
                last, sequence, states = original(layer, *args, **kwargs)
            finally:
                object.__setattr__(layer, "return_sequences", False)
        sequences = noted.setdefault(replicas.identity(), [])
        if not any(sequence is s for s in sequences):
            sequences.append(sequence)
        return last, sequence, states

    return inner_loop
