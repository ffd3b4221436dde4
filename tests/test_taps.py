"""Taps: what they note makes up the gradient, what the layers compute stays bit for bit, and nothing is left behind.

For every kind of layer: the sum over positions and examples of `a d'`, of inputs and slopes, is the gradient of the
layer's weights, which Keras and TensorFlow compute by themselves.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BATCH, MODELS, Case, flat, normal
from keras import layers
from selection import some

from keras_curvature import Linearization
from keras_curvature.linearization.estimates.seen import Seen
from keras_curvature.linearization.layers import kronecker, taps
from keras_curvature.linearization.needs import Needs

pytestmark = pytest.mark.usefixtures("in_float64")

# Those that differ in what is tapped; the others of the registry run with the slow tests.
QUICK = [
    "dense", "einsum_dense", "conv2d", "depthwise_conv", "batch_normalization_2d", "layer_normalization", "lstm", "gru",
    "time_distributed", "embedding", "masked_outputs", "attention", "shared_layer", "frozen", "prelu",
]  # fmt: skip
REGISTERED = some(MODELS, QUICK)
# What no layer of the registry has.
SHAPES = {
    "strided": ((7, 8, 2), lambda: layers.Conv2D(4, (2, 3), strides=(2, 3), padding="same")),
    "dilated": ((7, 8, 2), lambda: layers.Conv2D(3, (3, 2), dilation_rate=(2, 3), padding="same", use_bias=False)),
    "grouped": ((5, 6, 4), lambda: layers.Conv2D(6, 3, groups=2, strides=2)),
    "causal": ((6, 2), lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2)),
    "depthwise_1d": ((6, 2), lambda: layers.DepthwiseConv1D(3, strides=2, padding="same", depth_multiplier=3)),
    "volume": ((3, 4, 3, 2), lambda: layers.Conv3D(4, (2, 3, 1), strides=(1, 2, 2), padding="same", groups=2)),
    "einsum_of_many_axes": (
        (3, 2, 4), lambda: layers.EinsumDense("btnc,cneh->bteh", (3, 2, 5), bias_axes="eh", activation="tanh"),
    ),
    "einsum_with_groups": ((3, 2, 4), lambda: layers.EinsumDense("btgc,cgd->btdg", (3, 5, 2))),
    "einsum_with_biased_groups": ((3, 2, 4), lambda: layers.EinsumDense("btgc,gcd->btgd", (3, 2, 5), bias_axes="gd")),
    "einsum_with_ellipsis": ((3, 2, 4), lambda: layers.EinsumDense("...c,cd->...d", 3, bias_axes="d")),
    "einsum_of_one_position": ((3, 4), lambda: layers.EinsumDense("btc,tcd->bd", 5, bias_axes="d")),
    "einsum_with_other_bias": ((3, 4), lambda: layers.EinsumDense("btc,cd->btd", (3, 5), bias_axes="t")),
    "grouped_attention": ((3, 4), lambda: Attends()),
    "scale_alone": ((3, 4), lambda: layers.LayerNormalization(axis=(1, 2), center=False)),
    "shift_alone": ((3, 4), lambda: layers.BatchNormalization(axis=1, scale=False)),
    "lstm_backwards": ((3, 2), lambda: layers.LSTM(2, go_backwards=True, use_bias=False)),
    "gru_reset_first": ((3, 2), lambda: layers.GRU(2, reset_after=False, return_sequences=True)),
    "gru_without_bias": ((3, 2), lambda: layers.GRU(2, use_bias=False)),
    "masked_rnn": ((3, 2), lambda: layers.SimpleRNN(3, dropout=0.4, recurrent_dropout=0.3, seed=1)),
    "dropout_lstm": ((3, 2), lambda: layers.LSTM(2, dropout=0.4, seed=1)),
    "rnn_of_a_cell": ((3, 2), lambda: layers.RNN(layers.GRUCell(2))),
}  # fmt: skip
DIAGONAL = {  # how many of a model's variables have no block
    "conv2d_transpose": 2, "separable_conv": 3, "recurrent_dropout": 3, "prelu": 1, "einsum_with_other_bias": 1,
    "gru_reset_first": 1,
}  # fmt: skip


class Attends(layers.Layer):
    """Attention of queries in groups of a sequence to itself."""

    def __init__(self):
        super().__init__()
        self.attention = layers.GroupQueryAttention(3, 4, 2)

    def call(self, x):
        """`(batch, time, units)` to the same."""
        return self.attention(x, x)


def build(name):
    """A compiled case of the registry, or of `SHAPES`."""
    if name in MODELS:
        return MODELS[name]().compile()
    shape, make = SHAPES[name]
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input(shape), make(), layers.Flatten(), layers.Dense(2)])
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * random.standard_normal(variable.shape))
    return Case(model, normal(random, BATCH, *shape), normal(random, BATCH, 2)).compile()


def attributes(model):
    """What every layer holds, by name."""
    return [dict(vars(layer)) for layer in model._flatten_layers()]


def gradient_by_blocks(lin, blocks):
    """For each block, the sum of `a d'` over calls, positions and examples, as tensors; of the mean loss."""
    seen = Seen(lin.passes.here().recorded, blocks)
    of = seen.slopes()
    for block in blocks:
        inputs, slopes = seen.inputs(block), of(block)
        if block.has_indices:
            inputs = [tf.one_hot(a[..., 0], block.shape[0], dtype=d.dtype) for a, d in zip(inputs, slopes)]
        total = sum(tf.einsum("gnti,gnto->gio", a, d) for a, d in zip(inputs, slopes))
        yield block, tf.reshape(total, block.shape)


SLOW_SHAPES = [
    "grouped", "volume",  # Keras compiles grouped convolutions on the CPU
    "rnn_of_a_cell", "masked_rnn", "gru_without_bias",
]  # fmt: skip
OTHERS = some(SHAPES, [name for name in SHAPES if name not in SLOW_SHAPES])


@pytest.mark.parametrize("name", [*REGISTERED, *OTHERS])
def test_what_is_noted_makes_up_the_gradient(name):
    case = build(name)
    blocks, diagonal, unsupported = kronecker.blocks(case.model)
    plain, lin = (Linearization(case.model, *case.batch, needs=Needs(layers=tapped)) for tapped in (False, True))
    before = plain.loss is not None and attributes(case.model)  # recurrent cells have their masks from now on
    for ours, theirs in ((flat([lin.loss]), flat([plain.loss])), (flat(lin.gradient), flat(plain.gradient))):
        np.testing.assert_array_equal(ours, theirs)
    found = [tf.zeros_like(w) for w in lin.weights]
    for block, matrix in gradient_by_blocks(lin, blocks):
        block.scatter(matrix, found)
    for i, (ours, theirs) in enumerate(zip(found, plain.gradient)):
        if i not in diagonal:
            np.testing.assert_allclose(ours, theirs, 1e-11, 1e-13)
    after = attributes(case.model)
    assert [set(a) for a in after] == [set(b) for b in before]
    same = [a[key] is b[key] or a[key] == b[key] for a, b in zip(after, before) for key in ("call", "bias") if key in b]
    assert all(np.all(s) for s in same)
    assert len(diagonal) == len(unsupported) == DIAGONAL.get(name, 0)


@pytest.mark.parametrize("name", ["depthwise_1d", "einsum_of_many_axes", "einsum_with_groups", "scale_alone", "lstm"])
def test_a_matrix_holds_each_weight_once(name):
    case = build(name)
    weights = [tf.constant(np.random.default_rng(i).standard_normal(v.shape)) for i, v in enumerate(case.model.weights)]
    blocks, _, _ = kronecker.blocks(case.model)
    for block in blocks:
        back = block.tensors(block.matrix(weights))
        assert sorted(flat([block.matrix(weights)])) == sorted(flat(back))
        np.testing.assert_array_equal(flat(back), flat([weights[i] for i in block.variables]))


def test_a_layer_of_an_unknown_kind_is_named():
    class Twice(layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    model = keras.Sequential([keras.Input((3,)), Twice(4, name="twice"), layers.Dense(2)])
    blocks, diagonal, unsupported = kronecker.blocks(model)
    assert [block.variables for block in blocks] == [(2, 3)] and diagonal == [0, 1]
    assert [path.split("/")[-2:] for path in unsupported] == [["twice", "kernel"], ["twice", "bias"]]
    with pytest.raises(ValueError, match='`sharing` must be "expand" or "reduce". Received: sharing=\'both\''):
        kronecker.blocks(model, "both")


def test_tied_lora_and_frozen_weights_have_no_block_of_their_own():
    class Tied(layers.Dense):
        def build(self, shape):
            self._kernel, self.bias = first.kernel, self.add_weight(shape=(3,))

    first, third, fourth = (layers.Dense(3) for _ in range(3))
    model = keras.Sequential([keras.Input((3,)), first, Tied(3), third, fourth])
    third.enable_lora(2)
    fourth.bias.trainable = False
    blocks, diagonal, unsupported = kronecker.blocks(model)
    assert [block.name for block in blocks] == [fourth.kernel.path] and blocks[0].shape == (3, 3)
    assert first.kernel.path in unsupported and third.lora_kernel_a.path in unsupported


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "dropout_lstm", "attention")]


@pytest.mark.parametrize("name", ["batch_normalization_2d", *SLOW])
def test_taps_leave_a_graph_as_it_is(name):
    case = build(name)
    blocks, _, _ = kronecker.blocks(case.model)

    def passed(tapped):
        @tf.function
        def run():
            lin = Linearization(case.model, tf.constant(case.x), tf.constant(case.y), needs=Needs(layers=tapped))
            return lin.loss, lin.gradient

        return run()

    for ours, theirs in zip(tf.nest.flatten(passed(True)), tf.nest.flatten(passed(False))):
        np.testing.assert_array_equal(ours, theirs)


def test_an_error_in_a_layer_leaves_nothing_behind():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, activation="tanh")])
    before = attributes(model)
    with pytest.raises(Exception, match="incompatible"), taps.calls(model.layers):  # noqa: B017, PT011
        model.layers[0].call(tf.zeros((2, 5), tf.float64))
    assert attributes(model) == before


def test_a_layer_inside_a_loop_is_refused_by_name():
    class Repeats(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(3, name="in_the_loop")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, self.inner(x)), (0, x))[1]

    model = keras.Sequential([keras.Input((3,)), Repeats()])
    model.compile(loss="mse")
    blocks, diagonal, _ = kronecker.blocks(model)

    @tf.function
    def run():
        lin = Linearization(model, tf.zeros((2, 3), tf.float64), tf.zeros((2, 3), tf.float64))
        return lin.kronecker_factors(blocks, diagonal)

    with pytest.raises(ValueError, match="'in_the_loop' is called inside a loop"):
        run()
