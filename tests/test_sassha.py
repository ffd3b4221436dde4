"""SASSHA by hand on separable quartics, where one probe gives the diagonal exactly."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import float64
from test_adahessian import REFERENCE, SHAPES, trained

import keras_curvature as kc
from keras_curvature import Linearization


def by_hand(rho, power, every, steps=12, rate=0.05, beta_1=0.9, beta_2=0.99):
    """The weights after each step."""
    w, a, b = (np.concatenate([REFERENCE[f"{n}_{part}"].ravel() for n in SHAPES]) for part in ("init", "a", "b"))
    m, D, found = 0.0, 0.0, []
    for t in range(steps):
        g = a * w**3 + b * w
        there = w + rho * g / np.linalg.norm(g)
        m = beta_1 * m + (1 - beta_1) * (a * there**3 + b * there)
        if t % every == 0:
            D = beta_2 * D + (1 - beta_2) * np.abs(3 * a * there**2 + b)
        estimates = t // every + 1
        denominator = (D / (1 - beta_2**estimates)) ** power + 1e-4
        w = w - rate * m / (1 - beta_1 ** (t + 1)) / denominator
        found.append(w)
    return np.array(found)


@pytest.mark.parametrize(("rho", "power", "every"), [(0.3, 0.5, 3), (0.0, 1.0, 1), (0.2, 0.0, 2)])
def test_steps_are_those_by_hand(rho, power, every):
    with float64():
        optimizer = kc.SASSHA.paper(learning_rate=0.05, rho=rho, beta_2=0.99, hessian_power=power, every=every)
        found = trained(optimizer, steps=12)
    expected = by_hand(rho, power, every)
    assert np.abs(np.diff(expected, axis=0)).min() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_the_absolute_value_is_of_the_whole_batch():
    with float64():
        # curvatures 4 and -2 of the two examples: their mean is 1, and the mean of the absolute values 3
        model = kc.curved(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)]))
        optimizer = kc.SASSHA.paper(learning_rate=1.0, rho=0.0, beta_1=0.0, hessian_power=1.0, epsilon=1e-12, every=1)
        model.compile(optimizer, lambda y, z: tf.reduce_sum(y * z**2 / 2, -1))
        model.set_weights([np.array([[3.0]])])
        model.train_on_batch(np.ones((2, 1)), np.array([[4.0], [-2.0]]))
        np.testing.assert_allclose(model.get_weights()[0], 0.0, atol=1e-10)


def test_the_point_uphill_sees_the_masks_of_the_step():
    with float64():
        keras.utils.set_random_seed(0)
        model = kc.curved(keras.Sequential([
            keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dropout(0.5),
            keras.layers.Dense(2),
        ]))  # fmt: skip
        model.compile("sgd", "mse")
        random = np.random.default_rng(0)
        lin = Linearization(model, random.standard_normal((4, 6)), random.standard_normal((4, 2)))
        still = [tf.zeros_like(w) for w in lin.weights]
        there = lin.again(shift=still)
        assert float(lin.loss) == float(there.loss) != float(model.evaluate(*lin.batch[:2], verbose=0))
        for a, b in zip(lin.gradient, there.gradient):
            np.testing.assert_allclose(a, b, rtol=1e-14)
        step = [0.1 * g for g in lin.gradient]
        np.testing.assert_allclose(lin.again(shift=step).loss, lin.loss_at(step), rtol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [{"rho": -1.0}, {"beta_1": 1.0}, {"beta_2": 1.0}, {"hessian_power": 1.1}, {"epsilon": 0.0}, {"every": 0}],
)
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`SASSHA`: `{next(iter(arguments))}`"):
        kc.SASSHA(**arguments)


def test_the_limit_cuts_the_entries_of_the_step():
    step, free = (taken(limit) for limit in (0.02, None))
    assert np.abs(free).max() > 0.02
    np.testing.assert_allclose(step, np.clip(free, -0.02, 0.02), rtol=1e-4, atol=1e-6)


def taken(limit):
    """The first step, before the learning rate."""
    keras.utils.set_random_seed(0)
    model = kc.curved(keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]))
    model.compile(kc.SASSHA(1.0, step_max=limit), "mse")
    before = np.concatenate([w.ravel() for w in model.get_weights()])
    random = np.random.RandomState(1)
    model.train_on_batch(random.randn(8, 3), random.randn(8, 2))
    return np.concatenate([w.ravel() for w in model.get_weights()]) - before
