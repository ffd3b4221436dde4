"""AdaHessian against the authors' code, on separable quartics, where one probe gives the diagonal exactly."""

import pathlib
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, flat, float64

import keras_curvature as kc
from keras_curvature.linearization.pure.functional import PureModel
from keras_curvature.optimizers.adahessian import AdaHessian
from keras_curvature.optimizers.sophia import SophiaG, SophiaH

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "adahessian_quartics.npz")
SHAPES = {"vector": (5,), "matrix": (3, 4), "kernel": (3, 3, 2, 4)}


class Weights(keras.layers.Layer):
    """Its output is its weights, whatever the input, once for each example."""

    def build(self, _):
        self.own = [
            self.add_weight(shape=shape, name=name, initializer=_constant(REFERENCE[f"{name}_init"]))
            for name, shape in SHAPES.items()
        ]

    def call(self, inputs):
        whole = tf.concat([tf.reshape(w, [-1]) for w in self.own], 0)
        return inputs[:, :1] * whole


def _constant(value):
    return lambda shape, dtype: tf.constant(value, dtype)


def quartic(_, w):
    """`sum_i a_i w_i^4 / 4 + b_i w_i^2 / 2` of each example."""
    a, b = (np.concatenate([REFERENCE[f"{name}_{part}"].ravel() for name in SHAPES]) for part in "ab")
    return tf.reduce_sum(a * w**4 / 4 + b * w**2 / 2, -1)


def trained(optimizer, steps=20):
    """The weights after each step, an array."""
    model = kc.curved(keras.Sequential([keras.Input((1,)), Weights()]))
    model.compile(optimizer, quartic)
    x, rows = np.ones((2, 1)), []
    for _ in range(steps):
        model.train_on_batch(x, x)
        rows.append(flat(model.trainable_variables))
    return np.stack(rows)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_steps_are_those_of_the_authors_code(power, decay):
    with float64():
        found = trained(AdaHessian.paper(hessian_power=power, weight_decay=decay or None))
    name = f"weights_power{power}_decay{decay}".replace(".", "p")
    # Keras rounds `weight_decay` to float32
    np.testing.assert_allclose(found, REFERENCE[name], rtol=0, atol=1e-9 if decay else 1e-13)


def test_without_spatial_averaging_each_weight_of_a_kernel_has_its_own_curvature():
    with float64():
        found = trained(AdaHessian.paper(learning_rate=0.1, spatial_averaging=False), steps=1)[0]
        w, a, b = (np.concatenate([REFERENCE[f"{n}_{part}"].ravel() for n in SHAPES]) for part in ("init", "a", "b"))
    expected = w - 0.1 * (a * w**3 + b * w) / (np.abs(3 * a * w**2 + b) + 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_an_estimate_serves_for_so_many_steps():
    with float64():
        options = {"beta_1": 0.0, "beta_2": 0.5, "every": 3, "spatial_averaging": False}
        found = trained(AdaHessian.paper(learning_rate=0.1, **options), steps=5)
        w, a, b = (np.concatenate([REFERENCE[f"{n}_{part}"].ravel() for n in SHAPES]) for part in ("init", "a", "b"))
    s, estimates = 0.0, 0
    for step, row in enumerate(found):
        if step % 3 == 0:
            s, estimates = 0.5 * s + 0.5 * (3 * a * w**2 + b) ** 2, estimates + 1
        w = w - 0.1 * (a * w**3 + b * w) / (np.sqrt(s / (1 - 0.5**estimates)) + 1e-4)
        np.testing.assert_allclose(row, w, rtol=1e-9, atol=1e-12)


def test_a_kernel_keeps_one_curvature_and_the_logs_show_its_norm():
    case = MODELS["conv2d"]()
    optimizer = AdaHessian()
    case.compile(optimizer)
    logs = kc.curved(case.model).train_on_batch(*case.batch[:2], return_dict=True)
    kernel, bias = case.model.trainable_variables[:2]
    assert [tuple(d.shape) for d in optimizer._D[:2]] == [(1, 1, *kernel.shape[2:]), tuple(bias.shape)]
    squares = sum(np.sum(d.numpy()) for d in optimizer._D) / (1 - 0.999)
    np.testing.assert_allclose(logs["curvature_norm"], np.sqrt(squares), rtol=1e-4)
    assert logs["failed_refreshes"] == 0.0


@pytest.mark.parametrize(
    ("make", "expected"),
    [(AdaHessian, [1, 1, 1]), (partial(AdaHessian, every=2), [1, 1, 1]), (partial(SophiaG, every=2), [1, 1, 1]),
     (partial(SophiaH, every=2), [1, 1, 1])],
)  # fmt: skip
def test_a_step_is_one_forward_pass(make, expected, monkeypatch):
    case, passes = LOSSES["mse"](), []
    case.compile(make(), run_eagerly=True)
    evaluate = PureModel.evaluate
    monkeypatch.setattr(PureModel, "evaluate", lambda *args: passes.append(1) or evaluate(*args))
    for count in expected:
        passes.clear()
        kc.curved(case.model).train_on_batch(*case.batch[:2])
        assert len(passes) == count


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"beta_1": 1.0}, r"`beta_1` must be a number in \[0.0, 1.0\). Received: beta_1=1.0"),
        ({"beta_2": -0.1}, "`beta_2` must be .* Received: beta_2=-0.1"),
        ({"hessian_power": 2.0}, r"`hessian_power` must be a number in \[0.0, 1.0\]. Received: hessian_power=2.0"),
        ({"epsilon": "small"}, "`epsilon` must be .* Received: epsilon='small'"),
        ({"spatial_averaging": 3}, "`spatial_averaging` must be True or False. Received: spatial_averaging=3"),
        ({"every": 0}, "`every` must be an integer >= 1. Received: every=0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        AdaHessian(**kwargs)
