"""The cautious mask: what disagrees with the gradient is left out of the step."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import ONE_OF_EACH, OPTIMIZERS
from selection import some
from test_properties import crossentropy, data, network
from test_soap import random_gradients, trajectory

import keras_curvature as kc
from keras_curvature.optimizers.cautious import agreeing

STEPS_EACH_WEIGHT = {
    name for name, m in OPTIMIZERS.items()
    if m.cls.needs.only_gradients and m.cls.precondition is kc.optimizers.CurvatureOptimizer.precondition
}  # fmt: skip
FEW = ["curveball", "soap", "kfac", "muon"]


def masked(step, gradient):
    """The mask by hand, of one variable."""
    mask = step * gradient < 0
    return step * mask / max(mask.mean(), 1e-3)


@pytest.mark.usefixtures("in_float64")
def test_the_step_is_that_without_the_mask_times_the_mask():
    shapes, cls = [(4, 6), (5,), ()], kc.KLShampoo
    start, gradients = random_gradients(shapes)
    plain, cautious = (trajectory(cls(0.5, cautious=c), start, gradients, shapes) for c in (False, True))
    steps = np.diff(plain, axis=0)
    expected = [np.concatenate([masked(s[part], g[part]) for part in (slice(0, 24), slice(24, 29), slice(29, 30))])
                for s, g in zip(steps, gradients[1:])]  # fmt: skip
    np.testing.assert_allclose(np.diff(cautious, axis=0), expected, atol=1e-12)
    assert 0.1 < np.mean(np.array(expected) == 0) < 0.9


def test_a_mask_of_nothing_is_no_step_and_a_nan_stays_one():
    step = [tf.constant([1.0, 2.0]), tf.zeros((0, 3)), tf.constant([np.nan, -1.0])]
    gradient = [tf.constant([1.0, 2.0]), tf.zeros((0, 3)), tf.constant([1.0, 1.0])]
    found = agreeing(step, gradient)
    np.testing.assert_array_equal(found[0], [0, 0])
    np.testing.assert_array_equal(found[2], [np.nan, -1])
    huge = agreeing([tf.constant([-1e30, 1e30])], [tf.constant([1e30, 1e30])])[0]  # the product would overflow
    np.testing.assert_array_equal(huge, np.float32([-2e30, 0]))


CAN = [name for name in OPTIMIZERS if name not in STEPS_EACH_WEIGHT]


@pytest.mark.parametrize("name", some(CAN, [name for name in FEW if name in CAN]))
def test_no_weight_moves_against_its_gradient(name):
    x, y = data(8)
    model = kc.curved(network(normalized=False, dropout=0))
    model.compile(OPTIMIZERS[name](cautious=True), crossentropy())
    seen = 0
    for _ in range(4):
        with tf.GradientTape() as tape:
            loss = crossentropy()(y, model(x, training=True))
        gradients, before = tape.gradient(loss, model.trainable_variables), model.get_weights()
        logs = model.train_on_batch(x, y, return_dict=True)
        moved = [a - b for a, b in zip(model.get_weights(), before)]
        for step, gradient in zip(moved, gradients):
            assert np.all(step * np.sign(gradient) <= 0)
        length = np.sqrt(sum(np.sum(step.astype("float64") ** 2) for step in moved))
        seen += length
        rate = float(model.optimizer.learning_rate)
        if "step_norm" in logs:
            np.testing.assert_allclose(logs["step_norm"] * rate, length, rtol=1e-3, atol=1e-6)
        model.reset_metrics()
    assert seen > 0


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name in STEPS_EACH_WEIGHT])
def test_a_method_that_steps_each_weight_refuses_it(name):
    with pytest.raises(ValueError, match=r"steps each variable by itself.*Received: cautious=True"):
        OPTIMIZERS[name](cautious=True)


def test_it_is_in_the_config_where_it_is_set():
    assert kc.SOAP.from_config(kc.SOAP(cautious=True).get_config()).cautious
    assert "cautious" not in kc.SOAP().get_config()
    with pytest.raises(ValueError, match="`SOAP`: `cautious` must be True or False. Received: cautious=1"):
        kc.SOAP(cautious=1)


def test_it_has_no_known_limit():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(kc.SOAP(cautious=True), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    assert "`SOAP` with `cautious`" in kc.stability(model.optimizer).reason
