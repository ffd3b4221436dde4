"""Taps: what single layers saw and said during a forward pass.

A tap is opened around a whole evaluation, on all replicas at once, and notes under the key of each replica. It
replaces a method of a Keras layer (or layer class) while it is open; the layers compute what they always compute.
"""

import contextlib
import dataclasses
import inspect

import keras
import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.linearization.pure.differentiable import replaced


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
        with overridden(layer, activation=None):
            said = tf.identity(original(layer, inputs, *args, **kwargs))
        noted.setdefault(replicas.identity(), []).append(DenseTap(layer, inputs, said))
        return said if activation is None else activation(said)

    with replaced((keras.layers.Dense, "call", call)):
        yield noted


RECURRENT_CELLS = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)


@dataclasses.dataclass(frozen=True)
class Tap:
    """One call of a layer.

    Attributes:
        layer: The layer.
        inputs: What it was called on; of a recurrent layer `(inputs, last states)`, for every step.
        said: What it computed, before the activation; of a recurrent layer a zero that was added to that.
        options: Its other arguments, by name.
    """

    layer: keras.layers.Layer
    inputs: object
    said: tf.Tensor
    options: dict


@contextlib.contextmanager
def calls(layers, noted=None):
    """Note every call of some layers; yields `{replica: [Tap]}`, which is `noted`, where that is given."""
    noted = {} if noted is None else noted
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, keras.layers.RNN):
                noting = {"inner_loop": _noting_steps(layer, noted)}
            else:
                noting = {"call": _noting(layer, noted)}
            stack.enter_context(overridden(layer, **noting))
        yield noted


def _noting(layer, noted):
    original = layer.call

    def call(*args, **kwargs):
        options = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        inputs = options.pop(next(iter(options)))
        activation = getattr(layer, "activation", None)
        with overridden(layer, activation=None) if activation is not None else contextlib.nullcontext():
            said = tf.identity(original(*args, **kwargs))
        noted.setdefault(replicas.identity(), []).append(Tap(layer, inputs, said, options))
        return said if activation is None else activation(said)

    return call


def _noting_steps(layer, noted):
    """The loop of a recurrent layer, with a zero added to what the gates say before their activation.

    A tensor inside a loop cannot be differentiated in from outside. So the zeros of all steps come in beside the
    inputs, and the cell finds them in its bias.
    """
    original, cell = layer.inner_loop, layer.cell

    def inner_loop(sequences, initial_state, mask=None, training=False):
        zeros = _recorded_zeros(sequences, cell)
        seen = tf.concat([sequences, zeros], -1)
        plain = {"return_sequences": True, "use_cudnn": False}
        with overridden(layer, **plain), overridden(cell, call=_with_zeros(cell, sequences.shape[-1])):
            last, states_of_steps, states = original(seen, initial_state, mask=mask, training=training)
        before = _states_before(tf.nest.flatten(initial_state)[0], states_of_steps, layer.go_backwards)
        if training:
            sequences = _masked(sequences, cell.get_dropout_mask(sequences[:, 0]))
            before = _masked(before, cell.get_recurrent_dropout_mask(before[:, 0]))
        noted.setdefault(replicas.identity(), []).append(Tap(layer, (sequences, before), zeros, {}))
        return last, states_of_steps, states

    return inner_loop


def _with_zeros(cell, width):
    """The cell's `call` on inputs of this width with the zeros of a step behind them."""
    original = cell.call

    def call(inputs, states, training=False):
        bias, zeros = cell.bias, inputs[..., width:]
        if getattr(cell, "reset_after", False):  # a bias for the inputs and one for the state
            zeros = tf.stack(tf.split(zeros, 2, -1))
        if bias is not None:
            bias = tf.cast(keras.ops.convert_to_tensor(bias), zeros.dtype)
            zeros += bias[:, tf.newaxis] if bias.shape.rank == 2 else bias
        with overridden(cell, bias=zeros, use_bias=True):
            return original(inputs[..., :width], states, training=training)

    return call


def _recorded_zeros(sequences, cell):
    """Zeros for every step and gate, for a tape a function of the weights: else it would not look at them."""

    @tf.custom_gradient
    def recorded(kernel):
        width = cell.kernel.shape[-1] * (2 if getattr(cell, "reset_after", False) else 1)
        zeros = tf.zeros(tf.concat([tf.shape(sequences)[:2], [width]], 0), sequences.dtype)
        return tf.ensure_shape(zeros, [*sequences.shape[:2], width]), lambda _: tf.zeros_like(kernel)

    return recorded(tf.convert_to_tensor(cell.kernel))


def _states_before(first, states, backwards):
    """The state before each step, in the order of the inputs."""
    before = tf.concat([first[:, tf.newaxis], states[:, :-1]], 1)
    return tf.reverse(before, [1]) if backwards else before


def _masked(sequence, mask):
    return sequence if mask is None else sequence * mask[:, tf.newaxis]


@contextlib.contextmanager
def overridden(owner, **attributes):
    """While open, an object has these attributes; past Keras' attribute tracking, which is locked by now."""
    own = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        for name, value in attributes.items():
            object.__setattr__(owner, name, value)
        yield
    finally:
        for name in attributes:
            if name in own:
                object.__setattr__(owner, name, own[name])
            else:
                object.__delattr__(owner, name)


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
        # LSTM and GRU call the RNN's own loop from theirs
        with overridden(layer, return_sequences=True):
            last, sequence, states = original(layer, *args, **kwargs)
        sequences = noted.setdefault(replicas.identity(), [])
        if not any(sequence is s for s in sequences):
            sequences.append(sequence)
        return last, sequence, states

    return inner_loop
