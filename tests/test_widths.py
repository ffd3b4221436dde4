"""muP: with the scales of `mup_scales` steps move the activations of all widths alike, and without them they do not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_soap import random_gradients, trajectory

import keras_curvature as kc
from keras_curvature import Linearization
from keras_curvature.optimizers.widths import mup_scales

WIDTHS = (32, 256)


def network(width, seed=0):
    """8-width-width-4 with tanh; kernels of variance 1 / inputs, zero biases."""
    model = keras.Sequential([
        keras.Input((8,)), keras.layers.Dense(width, activation="tanh"), keras.layers.Dense(width, activation="tanh"),
        keras.layers.Dense(4),
    ])  # fmt: skip
    random = np.random.RandomState(seed)
    model.set_weights([
        random.randn(*w.shape) / np.sqrt(len(w)) if w.ndim == 2 else 0.0 * w for w in model.get_weights()
    ])  # fmt: skip
    return model


def changes(make, width, steps, scaled):
    """By how much the outputs of each layer change in three steps on three batches, root mean squares."""
    random = np.random.RandomState(1)
    x, y = random.randn(3, 16, 8), random.randn(3, 16, 4)
    model, scales = (network(width), mup_scales(network(width), network(WIDTHS[0]), steps))
    if scaled:
        scales.initialize(model)
    optimizer = make(scales=scales.rates if scaled else None)
    model = kc.curved(model)
    model.compile(optimizer, "mse")

    def activations():
        found, a = [], x.reshape(-1, 8)
        for kernel, bias in zip(*[iter(model.get_weights())] * 2):
            found.append(np.tanh(a @ kernel + bias) if len(found) < 2 else a @ kernel + bias)
            a = found[-1]
        return found

    before = activations()
    for batch in zip(x, y):
        optimizer.step(Linearization(model, *map(tf.constant, batch), needs=optimizer.needs))
    return np.array([np.sqrt(np.mean(np.square(a - b))) for a, b in zip(activations(), before)])


class Descent(kc.CurvatureOptimizer):
    """Gradient descent."""

    needs = kc.Needs(only_gradients=True)

    def precondition(self, gradients):
        return [-g for g in gradients]


# A method with its row of the table, and the most that its steps differ between the widths.
EVERY = {"factors_every": 1, "inverses_every": 1}
CASES = {
    "descent": (lambda **k: Descent(0.01, **k), "gradient", 1.5),
    "sophia_g": (lambda **k: kc.SophiaG(1e-3, **k), "adam", 1.3),
    "shampoo_grafted": (lambda **k: kc.Shampoo(1e-3, every=1, **k), "adam", 1.3),
    "soap": (lambda **k: kc.SOAP(1e-3, every=1, **k), "adam", 2.0),
    "shampoo": (lambda **k: kc.Shampoo(1e-3, every=1, grafting=None, **k), "spectral", 1.3),
    "muon": (lambda **k: kc.Muon(1e-3, scale="scion", adam_for=[], **k), "kfac", 1.3),
    "foof": (lambda **k: kc.FOOF(0.01, damping=1e-2, output_clip=None, **EVERY, **k), "foof", 1.6),
    "kfac": (lambda **k: kc.KFAC(0.01, damping=1e-8, kl_clip=None, **EVERY, **k), "kfac", 2.0),
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", some(list(CASES), ["descent", "shampoo"]))
def test_activations_move_alike_in_all_widths(name):
    make, steps, most = CASES[name]
    narrow, wide = (changes(make, width, steps, True) for width in WIDTHS)
    assert np.abs(np.log(wide / narrow)).max() < np.log(most)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", some(["descent", "sophia_g", "soap", "shampoo"], ["descent"]))
def test_without_scales_they_do_not(name):
    make, steps, _ = CASES[name]
    narrow, wide = (changes(make, width, steps, False) for width in WIDTHS)
    assert np.abs(np.log(wide / narrow)).max() > np.log(2.2)


def of_every_kind(width):
    """An embedding, attention of two heads, dense layers, normalization, convolutions and an output layer."""
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(10, width)(inputs)
    x = keras.layers.MultiHeadAttention(2, width // 2)(x, x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Conv1D(width, 3)(x)
    x = keras.layers.DepthwiseConv1D(3)(x)
    x = keras.layers.GRU(width)(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def test_growth_of_every_kind_of_weight():
    model, base = of_every_kind(32), of_every_kind(8)
    inputs, outputs = (
        [round(np.log(rate) / np.log(4), 6) for rate in mup_scales(model, base, steps).rates]
        for steps in ("adam", "foof")
    )
    names = [v.path.split("/", 1)[1] if v.path.startswith("multi") else v.path for v in model.trainable_variables]
    kernels = [v.name == "kernel" or "recurrent" in v.name for v in model.trainable_variables]
    depthwise = [name.startswith("depthwise") for name in names]
    last = len(names) - 2
    for i, name in enumerate(names):
        is_hidden = kernels[i] and not depthwise[i]
        assert -inputs[i] == float(is_hidden), name
        assert outputs[i] == float(i < last), name


def test_initial_weights():
    model, base = of_every_kind(32), of_every_kind(8)
    scales = mup_scales(model, base, "kfac")
    assert scales.rates == [1.0] * len(scales.rates)
    scales.initialize(model)
    for v, w in zip(model.trainable_variables, base.trainable_variables):
        size, of_base = (np.sqrt(np.mean(np.square(u.numpy()))) for u in (v, w))
        hidden = v.name in ("kernel", "recurrent_kernel") and not v.path.startswith("depthwise")
        expected = of_base / (4 if v.shape[-1] == 3 else 2) if hidden else of_base
        np.testing.assert_allclose(size, expected, rtol=1e-5, err_msg=v.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 1, "adam"), "`model` must be a built"),
        ((0, keras.Sequential(), "adam"), "`base` must be a built"),
        ((0, 1, "newton"), '`steps` must be "gradient".* Received: steps=.newton.'),
        ((0, "dense", "adam"), "2 trainable weights in `base` and 6"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    dense = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    models = {0: network(4), 1: network(3), "dense": dense}
    given = [models[a] if a in (0, 1, "dense") else a for a in arguments]
    with pytest.raises(ValueError, match=message):
        mup_scales(*given)


def test_models_of_other_layers_are_refused():
    other = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(3, 2)])
    with pytest.raises(ValueError, match=r"of shape \(2, 2, 1, 3\) in `base`"):
        mup_scales(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)]), other, "adam")


# The argument `scales` of every optimizer.


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("accumulated", [None, 2])
def test_each_step_is_scaled(accumulated):
    shapes, scales = [(4, 6), (5,)], [0.25, 3.0]
    start, gradients = random_gradients(shapes)
    made = [kc.KLShampoo(0.1, gradient_accumulation_steps=accumulated, **k) for k in ({}, {"scales": scales})]
    plain, scaled = (np.diff(trajectory(optimizer, start, gradients, shapes), axis=0) for optimizer in made)
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(scaled, plain * np.repeat(scales, [24, 5]), rtol=1e-9, atol=1e-15)


def test_scales_are_checked_and_saved():
    made = kc.SOAP.from_config(kc.SOAP(scales=[1.0, 2.0]).get_config())
    assert made.scales == [1.0, 2.0]
    assert "scales" not in kc.SOAP().get_config()
    for bad in (2.0, ["a"], [-1.0], [float("inf")]):
        with pytest.raises(ValueError, match="`SOAP`: `scales` must be a list of numbers"):
            kc.SOAP(scales=bad)
    with pytest.raises(ValueError, match=r"each of the 1 trainable weights.*Received: 2 numbers"):
        made.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="hyperball=True and `scales`"):
        kc.SOAP(scales=[1.0], hyperball=True)
    with pytest.raises(ValueError, match="steps each variable by itself"):
        kc.Neumann(scales=[1.0])
