"""Scion: its corners against what they must satisfy, its steps against the equations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_soap import random_gradients, trajectory

import keras_curvature as kc

EXACT = kc.PolarExpress(steps=12)
SHAPES = [(8, 6), (3, 3, 2, 4), (5,), (6, 7)]  # of which the last kernel is the output layer


def norms(shape, is_end, w):
    """The norm whose unit ball the corner of such a weight is in."""
    if is_end:
        return np.abs(w).max() * w.shape[0]
    if len(shape) == 1:
        return np.sqrt(np.mean(w**2))
    positions, rows = int(np.prod(shape[:-2])) if len(shape) > 2 else 1, int(np.prod(shape[:-1]))
    return np.linalg.norm(w.reshape(rows, -1), 2) * np.sqrt(rows / positions / shape[-1]) * positions


def parts(vector):
    """A vector as arrays of the shapes."""
    ends = np.cumsum([int(np.prod(s)) for s in SHAPES])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(vector, ends), SHAPES)]


@pytest.mark.usefixtures("in_float64")
def test_a_step_goes_to_the_corner_of_the_ball_that_descends_most():
    start, gradients = random_gradients(SHAPES, steps=1)
    settings = {"radius": 2.0, "radius_of_ends": 5.0, "sign": EXACT}
    (seen,) = trajectory(kc.Scion(0.1, **settings), start, gradients, SHAPES)
    random = np.random.default_rng(0)
    for i, (step, gradient, shape) in enumerate(zip(parts(seen - start), parts(gradients[0]), SHAPES)):
        radius = 0.1 * (5.0 if i == 3 else 2.0)
        np.testing.assert_allclose(norms(shape, i == 3, step), radius, rtol=1e-6)
        for _ in range(200):  # no other point of the ball descends more, near or far
            other = random.choice([0.0, 1.0]) * step + random.choice([1e-3, 1.0]) * random.standard_normal(shape)
            other *= radius / norms(shape, i == 3, other)
            assert np.sum(gradient * step) <= np.sum(gradient * other) + 1e-9


@pytest.mark.usefixtures("in_float64")
def test_constrained_weights_stay_in_their_balls_and_others_need_not():
    start, gradients = random_gradients(SHAPES, steps=60)
    gradients = gradients + 1.0  # always to one side
    settings = {"radius": 0.5, "radius_of_ends": 0.7, "sign": EXACT}
    seen = {c: trajectory(kc.Scion(0.2, constrained=c, **settings), start, gradients, SHAPES) for c in (True, False)}
    for i, shape in enumerate(SHAPES):
        radius = 0.7 if i == 3 else 0.5
        assert norms(shape, i == 3, parts(seen[True][-1])[i]) <= radius * 1.001
        assert norms(shape, i == 3, parts(seen[False][-1])[i]) > 2 * radius


@pytest.mark.usefixtures("in_float64")
def test_it_follows_the_momentum():
    shape, (start, gradients) = (6, 6), random_gradients([(6, 6), (6, 2)], steps=5)
    seen = trajectory(kc.Scion(0.1, momentum=0.7, radius=1.0, sign=EXACT), start, gradients, [shape, (6, 2)])
    w, M = start[:36].reshape(shape), 0.0
    for row, weights in zip(gradients, seen):
        M = 0.7 * M + 0.3 * row[:36].reshape(shape)
        U, _, V = np.linalg.svd(M)
        w = w - 0.1 * U @ V
        np.testing.assert_allclose(weights[:36], w.ravel(), atol=1e-6)


def test_an_embedding_is_scaled_by_the_width_of_the_model_as_the_output_layer_is():
    model = keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(11, 8), keras.layers.Dense(3)])
    model.compile(kc.Scion(1.0, radius_of_ends=8.0), "mse")
    before = model.get_weights()
    model.fit(np.arange(10).reshape(2, 5), np.ones((2, 5, 3)), verbose=0)
    moved = [np.abs(a - b) for a, b in zip(model.get_weights(), before)]
    np.testing.assert_allclose(moved[0][:10], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(moved[0][10], 0.0)  # which no batch has seen
    np.testing.assert_allclose(moved[1], 1.0, rtol=1e-5)


def test_gradients_of_any_size_and_zeros_do_no_harm():
    for scale in (0.0, 1e-25, 1e15):
        variables = [keras.Variable(np.ones(s), dtype="float32") for s in SHAPES]
        optimizer = kc.Scion(0.01)
        optimizer.build(variables)
        for seed in range(3):
            random = np.random.default_rng(seed)
            optimizer.apply([tf.constant(scale * random.standard_normal(s), "float32") for s in SHAPES], variables)
        assert int(optimizer.skipped_steps) == 0
        moved = [np.abs(v.numpy() - 1).max() for v in variables]
        assert all(np.isfinite(moved)) and all((m > 1e-3) == (scale > 0) for m in moved)


def test_the_bad_are_told():
    wrong = {"momentum": 1.0, "radius": 0.0, "radius_of_ends": -1, "constrained": 1, "sign": "polar"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`Scion`: `{name}`"):
            kc.Scion(**{name: value})
