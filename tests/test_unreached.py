"""Weights that the loss does not depend on, and gradients in another order: as with Keras' own optimizers."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import OPTIMIZERS
from selection import some

from keras_curvature import curved

USUAL = ["soap", "kfac", "curveball", "gauss_newton", "neumann", "square_root_free_adam"]


def network():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)])


def data():
    return np.random.default_rng(0).standard_normal((2, 8, 3)).astype("float32")


@pytest.mark.parametrize("name", some(list(OPTIMIZERS), USUAL))
def test_weights_that_the_loss_does_not_reach_stay_and_are_named(name):
    """As with Keras' optimizers, which neither step nor decay a weight without a gradient."""
    make = OPTIMIZERS[name]
    for curve in [True, False][: 1 + make.by_gradient]:
        inputs = keras.Input((3,))
        hidden = keras.layers.Dense(4, activation="tanh")(inputs)
        model = keras.Model(inputs, {key: keras.layers.Dense(2, name=key)(hidden) for key in "ab"})
        model = curved(model) if curve else model
        decay = {} if "hyperball" in name else {"weight_decay": 0.1}
        model.compile(make(**decay), {"a": "mse", "b": None})
        before = model.get_weights()
        x, y = data()
        with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['b/kernel', 'b/bias'\]"):
            model.fit(x, {"a": y[:, :2], "b": y[:, :2]}, batch_size=8, epochs=3, verbose=0)
        after = model.get_weights()
        moved = [not np.array_equal(a, b) for a, b in zip(before, after)]
        assert moved[:2] != [False, False]
        for i, variable in enumerate(model.weights):
            assert not (variable.path.startswith("b/") and moved[i]), variable.path


def test_a_head_without_a_gradient_in_this_step_stays():
    shared, *heads = (keras.layers.Dense(3) for _ in range(3))
    x = tf.constant(np.random.default_rng(0).standard_normal((8, 3)), "float32")
    variables = [v for layer in (shared, *heads) for v in (layer(x), layer.trainable_variables)[1]]
    optimizer = OPTIMIZERS["soap"]()
    for i in range(6):
        idle = heads[1 - i % 2].kernel
        before = idle.numpy()
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((heads[i % 2](shared(x)) - 1.0) ** 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.apply(tape.gradient(loss, variables), variables)
        np.testing.assert_array_equal(idle, before)


def test_a_loss_that_reaches_no_weight_is_refused():
    model = curved(network())
    model.compile(OPTIMIZERS["soap"](), lambda y, z: tf.reduce_mean(tf.stop_gradient(z) ** 2))
    x, y = data()
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        model.fit(x, y[:, :2], verbose=0)


def test_the_same_variables_in_another_order_are_the_same():
    (one, other), given = (network(), network()), []
    other.set_weights(one.get_weights())
    for model, turn in ((one, 1), (other, -1)):
        optimizer, variables = OPTIMIZERS["soap"](), model.trainable_variables
        optimizer.build(variables)
        for step in range(3):
            gradients = [tf.cos(step + v.value) for v in variables]
            optimizer.apply(gradients[::turn], variables[::turn])
        given.append(model.get_weights())
    for a, b in zip(*given):
        np.testing.assert_array_equal(a, b)
