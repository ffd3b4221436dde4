"""Convection, reaction and wave: residuals of the solutions, and of a network by differences."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature import problems

pytestmark = pytest.mark.usefixtures("in_float64")
MAKE = {"convection": problems.convection, "reaction": problems.reaction, "wave": problems.wave}
NAMES = list(MAKE)


def small(name):
    """`(model, its layer, rows)` with few points."""
    problem = MAKE[name](points=40, width=6, depth=2)
    model = problem.model(1)
    return model, model.get_layer("residuals"), problem.data()[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_has_no_residual(name, monkeypatch):
    _, layer, x = small(name)
    monkeypatch.setattr(layer, "u", layer.solution)
    # the bell of the reaction is periodic to 3e-4 only, as in the paper
    tolerance = 1e-10 if name != "reaction" else 0.2
    np.testing.assert_allclose(layer(tf.constant(x)), 0.0, atol=tolerance)
    inside = x[x[:, 2] > 0]
    assert len(inside) == 40 and np.abs(layer(tf.constant(inside))).max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_residuals_of_a_network_are_those_by_differences(name):
    model, layer, x = small(name)
    u = lambda x, t: layer.u(tf.constant(np.stack([x, t], -1))).numpy()[:, 0]  # noqa: E731
    x = np.concatenate([x[:10], x[40:50], x[-10:]])
    place, time, h = x[:, 0], x[:, 1], 1e-4
    value = u(place, time)
    in_time = (u(place, time + h) - u(place, time - h)) / (2 * h)
    in_space = (u(place + h, time) - u(place - h, time)) / (2 * h)
    twice = (u(place, time + h) - 2 * value + u(place, time - h)) / h**2
    twice -= 4 * (u(place + h, time) - 2 * value + u(place - h, time)) / h**2
    equation = {
        "convection": in_time + 40 * in_space, "reaction": in_time - 5 * value * (1 - value), "wave": twice
    }[name]  # fmt: skip
    begin = {
        "convection": np.sin(place), "reaction": np.exp(-((place - np.pi) ** 2) / (2 * (np.pi / 4) ** 2)),
        "wave": np.sin(np.pi * place) + 0.5 * np.sin(5 * np.pi * place),
    }[name]  # fmt: skip
    other = in_time if name == "wave" else value - u(place + 2 * np.pi, time)
    expected = x[:, 2] * equation + x[:, 3] * (value - begin) + x[:, 4] * other
    np.testing.assert_allclose(model(x)[:, 0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_sum_of_the_mean_squares_of_each_part(name):
    model, _, x = small(name)
    squares = model(x).numpy()[:, 0] ** 2
    parts = [x[:, 2] > 0, x[:, 3] > 0, x[:, 4] > 0]
    if name == "wave":  # the condition where it begins has another weight than that at the ends
        at_begin = parts[1] & (x[:, 1] == 0) & (x[:, 3] == x[40, 3])
        parts = [parts[0], at_begin, parts[1] & ~at_begin, parts[2]]
    assert [int(part.sum()) for part in parts] == ([40, 257, 202, 257] if name == "wave" else [40, 257, 101])
    total = sum((squares[part] / x[part, 2:].max(1) ** 2).mean() for part in parts)
    np.testing.assert_allclose(keras.losses.MeanSquaredError()(np.zeros((len(x), 1)), model(x)), total, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_the_solution_is_zero_and_that_of_zero_is_one(name, monkeypatch):
    model, layer, _ = small(name)
    monkeypatch.setattr(layer, "u", layer.solution)
    assert problems.relative_error(model, 11) == 0.0
    monkeypatch.setattr(layer, "u", lambda points: 0.0 * points[:, :1])
    assert problems.relative_error(model, 11) == 1.0


def test_models_save_and_bad_arguments_are_refused(tmp_path):
    model, _, x = small("wave")
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), model(x))
    with pytest.raises(ValueError, match="`points` must be from 1 to 25500. Received: points=30000"):
        problems.convection(points=30000)
    with pytest.raises(ValueError, match="`width` must be at least 1. Received: width=0"):
        problems.reaction(width=0)
