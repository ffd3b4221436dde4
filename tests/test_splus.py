"""SPlus against its equations, by NumPy."""

import keras
import numpy as np
import pytest
from test_soap import random_gradients, stepper, trajectory

from keras_curvature.optimizers.splus import SPlus

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("every", [1, 3])
def test_it_follows_the_equations(every):
    shape, b1, b2 = (5, 5), 0.8, 0.9  # of full rank from the first gradient on: null spaces have any basis
    start, gradients = random_gradients([shape], steps=10)
    seen = trajectory(SPlus(0.5, b1, b2, every=every), start, gradients, [shape])
    w, M, L, R, Q = start.reshape(shape), 0.0, 0.0, 0.0, [np.eye(n) for n in shape]
    for t, (row, weights) in enumerate(zip(gradients, seen)):
        G = row.reshape(shape)
        M, L, R = b1 * M + (1 - b1) * G, b2 * L + (1 - b2) * G @ G.T, b2 * R + (1 - b2) * G.T @ G
        w = w - 0.5 * 2 / 10 * Q[0] @ np.sign(Q[0].T @ M @ Q[1]) @ Q[1].T
        np.testing.assert_allclose(weights, w.ravel(), atol=1e-7, err_msg=f"step {t}")
        Q = Q if t % every else [np.linalg.eigh(S)[1] for S in (L, R)]


def test_the_first_step_is_the_sign_of_the_gradient():
    shapes = [(4, 6), (5,), (3, 3, 2, 4)]
    start, gradients = random_gradients(shapes, steps=1)
    (seen,) = trajectory(SPlus(0.5), start, gradients, shapes)
    sizes = np.concatenate([np.full(24, 2 / 10), np.full(5, 0.001), np.full(72, 2 / 22)])
    np.testing.assert_allclose(seen, start - 0.5 * sizes * np.sign(gradients[0]), atol=1e-8)


def test_a_step_is_bounded_however_old_the_basis():
    start, gradients = random_gradients([(5, 8)], steps=12)
    scales = np.geomspace(1e-3, 1e3, 12)[:, None]
    steps = np.diff(trajectory(SPlus(1.0, every=5), start, scales * gradients, [(5, 8)]), axis=0).reshape(-1, 5, 8)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=(1, 2)), 2 / 13 * 40**0.5, rtol=1e-6)
    assert np.linalg.norm(steps, 2, axis=(1, 2)).max() <= 2 / 13 * 40**0.5


def test_a_null_space_stays_one():
    start, gradients = random_gradients([(5, 4)], steps=6)
    gradients = [(g.reshape(5, 4) - g.reshape(5, 4).mean(1, keepdims=True)).ravel() for g in gradients]
    steps = np.diff(trajectory(SPlus(1.0, every=1), start, gradients, [(5, 4)]), axis=0).reshape(-1, 5, 4)
    np.testing.assert_allclose(steps.sum(-1), 0, atol=1e-6)
    assert np.abs(steps).max() > 0.1


def test_a_factor_that_is_not_finite_leaves_the_last_basis_and_is_reported():
    optimizer, random = SPlus(every=2), np.random.default_rng(0)
    variables, step = stepper(optimizer, [(4, 3)])
    for _ in range(3):
        assert step([random.standard_normal((4, 3))])["failed_refreshes"] == 0
    before = [b.numpy() for b in optimizer._bases]
    optimizer._factors[1].assign(np.full((3, 3), np.nan))
    assert [step([random.standard_normal((4, 3))])["failed_refreshes"] for _ in range(2)] == [0, 1]
    assert [np.array_equal(b.numpy(), old) for b, old in zip(optimizer._bases, before)] == [False, True]
    assert np.isfinite(variables[0].numpy()).all()


def test_a_long_axis_has_no_factor():
    optimizer = SPlus(max_dimension=5)
    optimizer.build([keras.Variable(np.ones(shape)) for shape in [(4, 9), (9,), (2, 2)]])
    assert [tuple(f.shape) for f in optimizer._factors] == [(4, 4), (2, 2), (2, 2)]


def test_the_bad_are_told():
    wrong = {"beta_1": 1.0, "beta_2": -0.1, "every": 0, "vector_scale": -1, "max_dimension": 1.5, "merge": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`SPlus`: `{name}`"):
            SPlus(**{name: value})
