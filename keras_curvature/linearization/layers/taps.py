"""Taps: the inputs and the pre-activations of single layers during a forward pass.

Open a tap around a whole evaluation, on all replicas at once; it notes under the key of each replica. The results of
the tapped layers do not change. A tap is a context variable, which a substitute for the `call` of the layer's class
reads; see `keras_internals/guards.py`. The layers are not modified: the substitute runs a twin of the layer without
activation.
"""

import contextlib
import contextvars
import dataclasses
import inspect

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.keras_internals import replaced, twin

RECURRENT_CELLS = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)


@dataclasses.dataclass(frozen=True)
class Tap:
    """One call of a layer.

    Attributes:
        layer: The layer.
        inputs: The inputs of the call; of a recurrent layer `(inputs, last states)`, for every step.
        pre_activation: The output before the activation; of a recurrent layer, a zero added to it.
        options: The other arguments of the call, by name.
    """

    layer: keras.layers.Layer
    inputs: object
    pre_activation: tf.Tensor
    options: dict


@dataclasses.dataclass(frozen=True)
class _Open:
    """An open tap: `wants(layer)` is whether the layer is tapped, `noted` is `{replica: [Tap]}`."""

    wants: object
    noted: dict


# The taps that this thread, or the caller of this replica, has open.
_open = contextvars.ContextVar("taps", default=())
_sequences = contextvars.ContextVar("hidden_states", default=None)


@contextlib.contextmanager
def calls(layers, noted=None):
    """Note every call of some layers; yields `{replica: [Tap]}`, which is `noted`, where that is given."""
    for layer in layers:
        if isinstance(layer, keras.layers.RNN):
            keras_internals.guard(*replaced.method_of(layer, "inner_loop"), _inner_loop)
        else:
            keras_internals.guard(*replaced.method_of(layer, "call"), _call)
    wanted = {id(layer): layer for layer in layers}  # not the twins of these layers
    with _tapping(lambda layer: id(layer) in wanted, noted) as noted:
        yield noted


@contextlib.contextmanager
def dense():
    """Note every call of a `Dense` layer, not of subclasses; yields `{replica: [Tap]}`."""
    keras_internals.guard(keras.layers.Dense, "call", _call)
    with _tapping(lambda layer: type(layer) is keras.layers.Dense) as noted:
        yield noted


@contextlib.contextmanager
def hidden_states(noted=None):
    """Note the output sequence of every recurrent layer, whole even where the layer returns only the last output.

    Yields `{replica: [sequence]}`, each sequence `(batch, time, units)`; it is `noted`, where that is given.
    """
    for name in replaced.RECURRENT_LOOPS:
        keras_internals.guard(*name, _inner_loop)
    with keras_internals.holding(_sequences, {} if noted is None else noted):
        yield _sequences.get()


@contextlib.contextmanager
def closed():
    """Note nothing meanwhile."""
    with keras_internals.holding(_open, ()), keras_internals.holding(_sequences, None):
        yield


@contextlib.contextmanager
def _tapping(wants, noted=None):
    opened = _Open(wants, {} if noted is None else noted)
    with keras_internals.holding(_open, (*_open.get(), opened)):
        yield opened.noted


def _note(layer, *seen):
    """Note one call in all open taps that want the layer."""
    for tap in _taps_of(layer):
        tap.noted.setdefault(replicas.identity(), []).append(Tap(layer, *seen))


def _taps_of(layer):
    return [tap for tap in _open.get() if tap.wants(layer)]


def _call(original, layer, *args, **kwargs):
    """The `call` of a layer, noted before the activation."""
    if not _taps_of(layer):
        return original(layer, *args, **kwargs)
    options = dict(inspect.signature(original).bind(layer, *args, **kwargs).arguments)
    _, inputs = (options.pop(name) for name in list(options)[:2])
    activation = getattr(layer, "activation", None)
    without = twin(layer) if activation is None else twin(layer, activation=None)
    pre_activation = original(without, *args, **kwargs)
    if isinstance(pre_activation, tf.RaggedTensor):
        return _ragged(layer, inputs, pre_activation, options)
    pre_activation = tf.identity(pre_activation)
    _note(layer, _densely(inputs, layer), pre_activation, options)
    return pre_activation if activation is None else activation(pre_activation)


def _densely(inputs, layer):
    """Sparse inputs of a layer as a dense tensor, because the factor of its inputs is a dense matrix."""
    if not isinstance(inputs, tf.SparseTensor):
        return inputs
    dense = tf.sparse.to_dense(inputs, validate_indices=False)
    axes = getattr(layer.input_spec, "axes", {})  # the static length of the last axis, which `to_dense` may lose
    return tf.ensure_shape(dense, [*dense.shape[:-1], axes.get(-1, dense.shape[-1])])


def _ragged(layer, inputs, said, options):
    """Ragged outputs of a layer without activation (`Embedding`), noted padded: index -1, which stands for no row."""
    padded = tf.identity(said.to_tensor())
    _note(layer, inputs.to_tensor(-1), padded, options)
    return tf.RaggedTensor.from_tensor(padded, said.nested_row_lengths(), ragged_rank=said.ragged_rank)


def _inner_loop(original, layer, sequences, initial_state, mask=None, training=False):
    """The loop of a recurrent layer, noted by the open taps."""
    if _taps_of(layer):
        last, sequence, states = _noted_loop(original, layer, sequences, initial_state, mask, training)
    elif _sequences.get() is not None:
        whole = twin(layer, return_sequences=True)
        last, sequence, states = original(whole, sequences, initial_state, mask=mask, training=training)
    else:
        return original(layer, sequences, initial_state, mask=mask, training=training)
    if _sequences.get() is not None:
        noted = _sequences.get().setdefault(replicas.identity(), [])
        if not any(sequence is other for other in noted):  # LSTM and GRU call the loop of RNN in theirs
            noted.append(sequence)
    return last, sequence, states


def _noted_loop(original, layer, sequences, initial_state, mask, training):
    """The loop with a zero added to the pre-activations of the gates.

    A tensor inside a loop cannot be differentiated in from outside. So the zeros of all steps come in beside the
    inputs, and the cell finds them in its bias.
    """
    cell = layer.cell
    zeros = _recorded_zeros(sequences, cell)
    stepping = twin(
        layer, return_sequences=True, use_cudnn=False, cell=twin(cell, call=_with_zeros(cell, sequences.shape[-1]))
    )
    with_zeros = tf.concat([sequences, zeros], -1)
    last, states_of_steps, states = original(stepping, with_zeros, initial_state, mask=mask, training=training)
    before = _states_before(tf.nest.flatten(initial_state)[0], states_of_steps, layer.go_backwards)
    if training:  # the layer has drawn the masks before its loop
        sequences = _masked(sequences, cell.get_dropout_mask(sequences[:, 0]))
        before = _masked(before, cell.get_recurrent_dropout_mask(before[:, 0]))
    _note(layer, (sequences, before), zeros, {})
    return last, states_of_steps, states


def _with_zeros(cell, width):
    """The cell's `call` on inputs of this width with the zeros of a step behind them."""

    def call(inputs, states, training=False):
        bias, zeros = cell.bias, inputs[..., width:]
        if getattr(cell, "reset_after", False):  # a bias for the inputs and one for the state
            zeros = tf.stack(tf.split(zeros, 2, -1))
        if bias is not None:
            bias = tf.cast(keras.ops.convert_to_tensor(bias), zeros.dtype)
            zeros += bias[:, tf.newaxis] if bias.shape.rank == 2 else bias
        return twin(cell, bias=zeros, use_bias=True).call(inputs[..., :width], states, training=training)

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
