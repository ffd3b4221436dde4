"""Cautious weight decay and the hyperball, which change the step of any method; for the mask see test_cautious.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import ONE_OF_EACH, OPTIMIZERS
from selection import some
from test_cautious import FEW, STEPS_EACH_WEIGHT
from test_properties import crossentropy, data, network
from test_soap import random_gradients, trajectory

import keras_curvature as kc
from keras_curvature.optimizers.cautious import decaying
from keras_curvature.optimizers.hyperball import on_spheres

SHAPES = [(4, 6), (5,), ()]
PARTS = (slice(0, 24), slice(24, 29), slice(29, 30))
CAN = [name for name in OPTIMIZERS if name not in STEPS_EACH_WEIGHT]


def steps_of(weights, start):
    return np.diff(weights, axis=0, prepend=start[None])


# Cautious weight decay.


@pytest.mark.usefixtures("in_float64")
def test_weights_shrink_where_the_step_shrinks_them():
    start, gradients = random_gradients(SHAPES)
    rate, decay = 0.1, 0.3
    optimizer = kc.KLShampoo(rate, weight_decay=decay, cautious_decay=True)
    w, plain, expected = start, trajectory(kc.KLShampoo(rate), start, gradients, SHAPES), []
    for step in steps_of(plain, start):  # the method does not see the weights
        w = w + step - rate * decay * w * (step * w <= 0)
        expected.append(w)
    np.testing.assert_allclose(trajectory(optimizer, start, gradients, SHAPES), expected, rtol=1e-9, atol=1e-12)
    whole = trajectory(kc.KLShampoo(rate, weight_decay=decay), start, gradients, SHAPES)
    assert np.abs(whole - expected).max() > 1e-3


def test_excluded_weights_do_not_shrink():
    start, gradients = random_gradients([(4, 6)])
    found = []
    for decay in (None, 0.5):
        optimizer = kc.SOAP(0.1, weight_decay=decay, cautious_decay=True)
        optimizer.exclude_from_weight_decay(var_names=["variable"])
        found.append(trajectory(optimizer, start, gradients, [(4, 6)], dtype="float32"))
    np.testing.assert_array_equal(*found)


def test_a_nan_of_the_step_stays_and_a_zero_decays():
    step, w = [tf.constant([np.nan, 0.0, 1.0, -1.0])], [tf.constant([1.0, 2.0, 3.0, 4.0])]
    np.testing.assert_array_equal(decaying(step, w, [0.5])[0], [np.nan, -1.0, 1.0, -3.0])
    assert decaying(step, w, [0.0])[0] is step[0]


# The hyperball.


@pytest.mark.usefixtures("in_float64")
def test_kernels_turn_by_the_learning_rate_and_keep_their_norm():
    start, gradients = random_gradients(SHAPES)
    rate, kernel = 0.05, PARTS[0]
    seen = trajectory(kc.KLShampoo(rate, hyperball=True), start, gradients, SHAPES)
    plain = trajectory(kc.KLShampoo(rate), start, gradients, SHAPES)
    w, expected = start[kernel], []
    for step in steps_of(plain, start)[:, kernel]:
        if np.any(step):  # the first step fills the state
            u = w + rate * np.linalg.norm(w) * step / np.linalg.norm(step)
            w = np.linalg.norm(w) * u / np.linalg.norm(u)
        expected.append(w)
    np.testing.assert_allclose(seen[:, kernel], expected, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(seen[:, kernel], axis=1), np.linalg.norm(start[kernel]), rtol=1e-12)
    for part in PARTS[1:]:
        np.testing.assert_allclose(seen[:, part], plain[:, part], rtol=1e-12)


def test_it_leaves_zero_kernels_and_zero_steps_and_shows_what_is_not_finite():
    kernels = [keras.Variable(np.full((2, 2), value, "float32")) for value in (0.0, 3.0, 1.0, 1.0)]
    steps = [tf.fill([2, 2], value) for value in (7.0, 0.0, np.nan, 1e30)]
    found = on_spheres(steps, kernels, tf.constant(0.1))
    for seen, expected in zip(found[:3], steps):
        np.testing.assert_array_equal(seen, expected)
    np.testing.assert_allclose(found[3], 0.0, atol=1e-6)  # along the kernel
    still = on_spheres([tf.constant([[1.0, 2.0]])], [keras.Variable([[3.0, 4.0]])], tf.constant(0.0))
    np.testing.assert_array_equal(still[0], [[0.0, 0.0]])


@pytest.mark.parametrize("name", some(CAN, FEW))
def test_the_norms_of_kernels_stay_in_training(name):
    x, y = data(8)
    model = kc.curved(network(normalized=False, dropout=0))
    model.compile(OPTIMIZERS[name](hyperball=True, learning_rate=0.03), crossentropy())
    start = model.get_weights()
    for _ in range(4):
        model.train_on_batch(x, y)
    for w, before in zip(model.get_weights(), start):
        if w.ndim > 1:
            np.testing.assert_allclose(np.linalg.norm(w), np.linalg.norm(before), rtol=1e-5)
            assert np.abs(w - before).max() < 4 * 0.031 * np.linalg.norm(before)
    assert any(np.any(w != before) for w, before in zip(model.get_weights(), start))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("wrapper", "rate"), [("cautious", 0.5), ("hyperball", 0.1)])
def test_accumulated_gradients_are_wrapped_as_their_mean_is(wrapper, rate):
    shapes = [(4, 6), (5,)]
    start, gradients = random_gradients(shapes)
    pairs = np.repeat(gradients, 2, axis=0)
    whole = trajectory(kc.SOAP(rate, **{wrapper: True}), start, gradients, shapes)
    parts = trajectory(kc.SOAP(rate, **{wrapper: True}, gradient_accumulation_steps=2), start, pairs, shapes)
    np.testing.assert_allclose(parts[1::2], whole, rtol=1e-9)


# With other arguments.


class Downhill(kc.CurvatureOptimizer):
    """Gradient descent by a `direction`."""

    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def direction(self, lin):
        """Along the negative gradient, with its length reported."""
        self.report(step_norm=tf.linalg.global_norm(lin.gradient))
        return [-g for g in lin.gradient]


def one_step(**options):
    """`(weights, weights after a step of Downhill, logs)` of one layer, the weights as a list of arrays."""
    keras.utils.set_random_seed(0)
    model = kc.curved(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, bias_initializer="ones")]))
    model.compile(Downhill(0.1, **options), "mse", run_eagerly=True)
    before, random = model.get_weights(), np.random.default_rng(0)
    logs = model.train_on_batch(random.normal(size=(8, 4)), random.normal(size=(8, 3)), return_dict=True)
    return before, model.get_weights(), logs


CLIPS = [{"clipnorm": 0.1}, {"clipvalue": 0.02}, {"global_clipnorm": 0.1}]


@pytest.mark.parametrize("clip", CLIPS)
def test_a_clipped_step_keeps_the_norm_of_a_kernel(clip):
    (w, _), (plain, _), _ = one_step(**clip)
    step, radius = plain - w, np.linalg.norm(w)
    u = w + 0.1 * radius * step / np.linalg.norm(step)
    _, (after, _), _ = one_step(hyperball=True, **clip)
    np.testing.assert_allclose(after, radius * u / np.linalg.norm(u), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(after), radius, rtol=1e-6)


def test_what_is_clipped_is_the_step_before_scales_and_decay():
    clip = {"clipvalue": 0.02}
    w, plain, logs = one_step(**clip)
    step = [(b - a) / 0.1 for a, b in zip(w, plain)]
    assert logs["step_norm"] == pytest.approx(np.linalg.norm(np.r_[step[0].ravel(), step[1]]), rel=1e-4)
    assert logs["step_norm"] < 0.5 * one_step()[2]["step_norm"]
    _, both, _ = one_step(scales=[0.0, 2.0], weight_decay=0.5, cautious_decay=True, **clip)
    for a, b, s, scale in zip(w, both, step, (0.0, 2.0)):
        np.testing.assert_allclose(b, a + 0.1 * (scale * s - 0.5 * a * (scale * s * a <= 0)), rtol=1e-4, atol=1e-6)


def test_clipping_does_not_hide_a_step_that_is_too_long_for_its_dtype():
    class Endless(Downhill):
        def direction(self, lin):
            return [1e30 * g for g in lin.gradient]

    model = kc.curved(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    model.compile(Endless(0.1, clipnorm=1.0), "mse", run_eagerly=True)
    logs = model.train_on_batch(np.ones((8, 4)), np.zeros((8, 3)), return_dict=True)
    assert logs["skipped_steps"] == 1.0 and np.isnan(logs["step_norm"])


# Both.


@pytest.mark.parametrize("argument", ["cautious_decay", "hyperball"])
def test_it_is_in_the_config_where_it_is_set(argument):
    assert getattr(kc.SOAP.from_config(kc.SOAP(**{argument: True}).get_config()), argument)
    assert argument not in kc.SOAP().get_config()
    with pytest.raises(ValueError, match=f"`SOAP`: `{argument}` must be True or False. Received: {argument}=1"):
        kc.SOAP(**{argument: 1})
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(kc.SOAP(**{argument: True}), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    assert f"`SOAP` with `{argument}`" in kc.stability(model.optimizer).reason


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name in STEPS_EACH_WEIGHT])
def test_a_method_that_steps_each_weight_refuses_it(name):
    with pytest.raises(ValueError, match=r"steps each variable by itself.*Received: hyperball=True"):
        OPTIMIZERS[name](hyperball=True)


def test_the_hyperball_refuses_weight_decay():
    with pytest.raises(ValueError, match="Received: hyperball=True, weight_decay=0.1"):
        kc.SOAP(hyperball=True, weight_decay=0.1)
