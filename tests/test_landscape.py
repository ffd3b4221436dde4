"""Slices of the loss against Keras' own evaluation, dense Hessians, and the invariance that they are made for."""

import io
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import MODELS, flat, float64, put
from keras import layers

from keras_curvature.monitor.report.landscape import filter_axes, filter_normalized, landscape


def network(activation="tanh", seed=0):
    """A small compiled float64 classifier with 4 inputs, and its data `(x, y)`."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((4,)), layers.Dense(5, activation=activation), layers.Dense(4, activation=activation)]
    model = keras.Sequential([*stack, layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(seed)
    return model, (random.standard_normal((9, 4)), random.integers(0, 3, 9))


@pytest.fixture(scope="module")
def small():
    with float64():
        model, data = network()
        drawn = landscape(model, data, "sharpest+random+gradient", points=5, span=0.4)
        yield model, data, drawn


def loss_of(model, data, weights):
    """The loss by Keras' own evaluation of a copy that has these weights."""
    copy = keras.models.clone_model(model)
    copy.compile(loss=model.loss)
    put(copy.trainable_variables, weights)
    outputs = copy(data[0], training=False)
    return float(model.loss(data[1], outputs))


def dense_hessian(model, data):
    """Loss, gradient and Hessian by nested tapes."""
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            loss = model.loss(data[1], model(data[0], training=False))
        gradient = inner.gradient(loss, [v.value for v in model.trainable_variables])
        parts = tf.unstack(tf.concat([tf.reshape(g, [-1]) for g in gradient], 0))
    values = [v.value for v in model.trainable_variables]
    rows = [outer.gradient(part, values, unconnected_gradients="zero") for part in parts]
    return float(loss), flat(gradient), np.stack([flat(row) for row in rows])


def test_losses_are_those_of_the_moved_model(small):
    model, data, drawn = small
    start = flat(model.trainable_variables)
    for name, direction in drawn.directions.items():
        expected = [loss_of(model, data, start + t * flat(direction)) for t in drawn.axis]
        np.testing.assert_allclose(drawn.loss[name], expected, rtol=1e-12)


def test_parabolas_and_named_directions_are_those_of_the_dense_hessian(small):
    model, data, drawn = small
    loss, gradient, hessian = dense_hessian(model, data)
    values, vectors = np.linalg.eigh(hessian)
    sharpest, along = flat(drawn.directions["sharpest"]), flat(drawn.directions["gradient"])
    assert abs(sharpest @ vectors[:, -1]) > 1 - 1e-5
    assert sharpest @ gradient <= 0  # downhill to the right
    np.testing.assert_allclose(along, gradient / np.linalg.norm(gradient), rtol=1e-10, atol=1e-14)
    for name, direction in drawn.directions.items():
        d = flat(direction)
        expected = [loss + t * gradient @ d + t**2 / 2 * d @ hessian @ d for t in drawn.axis]
        np.testing.assert_allclose(drawn.quadratic[name], expected, rtol=1e-10)


def test_the_parabola_is_right_to_third_order(small):
    model, data, drawn = small
    own = {"d": drawn.directions["random"]}
    errors = []
    for span in (0.1, 0.05):
        line = landscape(model, data, own, points=3, span=span)
        errors.append(line.loss["d"] - line.quadratic["d"])
        assert abs(errors[-1][1]) < 1e-15
    odd = [(e[2] - e[0]) / 2 for e in errors]  # the even part is of fourth order
    assert odd[0] / odd[1] == pytest.approx(8, rel=0.02)
    assert abs(odd[0]) > 1e-9


def test_whole_layers_rescaled_give_the_same_slice(in_float64):
    model, data = network("relu")
    before = landscape(model, data, "random", points=7)
    first, second, _ = model.layers
    first.kernel.assign(first.kernel * 10.0)
    first.bias.assign(first.bias * 10.0)
    second.kernel.assign(second.kernel / 10.0)
    after = landscape(model, data, "random", points=7)
    np.testing.assert_allclose(after.loss["random"], before.loss["random"], rtol=1e-12)
    assert np.ptp(before.loss["random"]) > 0.01
    # as it is not along a direction of the same entries
    unscaled = {"same": before.directions["random"]}
    assert abs(landscape(model, data, unscaled, points=3).loss["same"] - before.loss["random"][::3]).max() > 1e-3


@pytest.mark.parametrize(
    "name, layer_type, attribute, filters",
    [
        ("dense", layers.Dense, "kernel", "i->o"),
        ("conv2d", layers.Conv2D, "kernel", "hwi->o"),
        ("conv2d_transpose", layers.Conv2DTranspose, "kernel", "hwOi"),
        ("depthwise_conv", layers.DepthwiseConv2D, "kernel", "hwIM"),
        ("separable_conv", layers.SeparableConv2D, "depthwise_kernel", "hwIM"),
        ("separable_conv", layers.SeparableConv2D, "pointwise_kernel", "hwi->o"),
        ("embedding", layers.Embedding, "embeddings", "Vd"),
        ("lstm", layers.LSTM, "kernel", "i->o"),
        ("lstm", layers.LSTM, "recurrent_kernel", "i->o"),
        ("einsum_dense", layers.EinsumDense, "kernel", "i->o"),
    ],
)
def test_filters_have_the_length_of_the_weights(name, layer_type, attribute, filters):
    case = MODELS[name]()
    layer = next(layer for layer in case.model.layers if isinstance(layer, layer_type))
    variable = getattr(getattr(layer, "cell", layer), attribute)
    direction = filter_normalized(case.model, seed=3)
    place = [v is variable for v in case.model.trainable_variables].index(True)
    letters = filters.replace("->", "").replace("o", "O")
    summed = tuple(i for i, letter in enumerate(letters) if letter.islower())
    weights, d = variable.numpy(), direction[place].numpy()
    lengths = [np.sqrt(np.sum(a**2, axis=summed)) for a in (weights, d)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-5)
    assert lengths[0].size == np.prod([weights.shape[i] for i, c in enumerate(letters) if c.isupper()])
    assert len(np.unique(np.round(d / np.abs(d).max(), 6))) > 2  # and are random inside


@pytest.mark.parametrize("name", ["dense", "batch_normalization", "gru", "attention", "prelu", "time_distributed"])
def test_biases_scales_and_shifts_do_not_move(name):
    model = MODELS[name]().model
    axes = filter_axes(model)
    assert set(axes) == {id(v) for v in model.trainable_variables}
    for variable, direction in zip(model.trainable_variables, filter_normalized(model)):
        still = variable.path.rsplit("/", 1)[1] in ("bias", "gamma", "beta", "alpha")
        assert (np.abs(direction).max() == 0) == still, variable.path


def test_a_plane_has_its_lines(in_float64):
    model, data = network()
    plane = landscape(model, data, "random x gradient+random+gradient+random x random", points=3, span=0.2)
    name = "random x gradient"
    assert plane.loss[name].shape == (3, 3)
    np.testing.assert_allclose(plane.loss[name][:, 1], plane.loss["random"], rtol=1e-13)
    np.testing.assert_allclose(plane.loss[name][1], plane.loss["gradient"], rtol=1e-13)
    np.testing.assert_allclose(plane.quadratic[name][1], plane.quadratic["gradient"], rtol=1e-13)
    start, (u, v) = flat(model.trainable_variables), (flat(plane.directions[n]) for n in ("random", "gradient"))
    assert plane.loss[name][0, 2] == pytest.approx(loss_of(model, data, start - 0.2 * u + 0.2 * v), rel=1e-12)
    loss, gradient, hessian = dense_hessian(model, data)
    d = -0.2 * u + 0.2 * v
    assert plane.quadratic[name][0, 2] == pytest.approx(loss + gradient @ d + d @ hessian @ d / 2, rel=1e-10)
    other = flat(plane.directions["another random"])
    assert abs(u @ other) < 0.9 * np.linalg.norm(u) * np.linalg.norm(other)


def test_nothing_is_changed(small):
    model, data, _ = small
    weights, state = flat(model.trainable_variables), np.random.get_state()[1].copy()
    landscape(model, data, "random", points=2)
    np.testing.assert_array_equal(flat(model.trainable_variables), weights)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_the_same_seed_is_the_same_direction():
    model = MODELS["dense"]().model
    one, again, other = (flat(filter_normalized(model, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


def test_the_figure_has_the_lines(small):
    from matplotlib._pylab_helpers import Gcf

    open_before = len(Gcf.figs)
    figure = small[2].figure()
    ax = figure.axes[0]
    assert len(ax.lines) == 6
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), small[2].loss["sharpest"])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), small[2].quadratic["sharpest"])
    assert len(Gcf.figs) == open_before  # pyplot knows nothing of it


def test_the_figure_of_a_plane_is_its_contours(in_float64):
    model, data = network()
    figure = landscape(model, data, "random x random+gradient", points=3).figure()
    assert [ax.get_xlabel() for ax in figure.axes] == ["step", "step, random", ""]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"directions": "steepest"}, "names among 'sharpest', 'random', 'gradient'"),
        ({"directions": "random x"}, "Received: directions='random x'"),
        ({"directions": "gradient x gradient"}, "gradient x gradient"),
        ({"directions": []}, "vectors in a list or dict"),
        ({"directions": None}, "Received: directions=None"),
        ({"directions": {"mine": [np.zeros(3)]}}, r"`directions\['mine'\]` must be a list of 6 tensors"),
        ({"points": 1}, "`points` must be an integer >= 2"),
        ({"span": 0.0}, r"`span` must be a number in \(0, inf\)"),
    ],
)
def test_mistakes_say_what_to_do(small, wrong, message):
    model, data, _ = small
    with pytest.raises(ValueError, match=message):
        landscape(model, data, **wrong)


class Terminal(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self):
        return True


def test_a_bar_in_a_terminal_and_a_figure_in_a_notebook(small, monkeypatch):
    model, data, drawn = small
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with float64():
        landscape(model, data, "gradient", points=3)
    assert "3/3" in terminal.getvalue()
    monkeypatch.setattr(sys, "stdout", silent := io.StringIO())
    assert drawn._repr_png_().startswith(b"\x89PNG") and silent.getvalue() == ""
