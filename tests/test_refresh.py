"""Bases and roots that are computed anew when their matrices have moved."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_soap import random_gradients, stepper, trajectory

import keras_curvature as kc
from keras_curvature import Refresh
from keras_curvature.solvers import eigenbases

METHODS = {"soap": kc.SOAP, "kl_shampoo": kc.KLShampoo, "shampoo": kc.Shampoo, "kl_soap": kc.SOAP}
# Squared gradients of 1, as here, are far above KL-Shampoo's default `initial`: the first factors would last too long.
OPTIONS = {"kl_soap": {"factors": "kl"}, "kl_shampoo": {"initial": 0.1}}
every_method = pytest.mark.parametrize("name", METHODS)


def method(name, **kwargs):
    return METHODS[name](**OPTIONS.get(name, {}), **kwargs)


def positive(seed, n=5):
    """A positive definite matrix with eigenvalues that are apart."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return basis * 3.0 ** np.arange(n) @ basis.T


def rotation(angle, n=5):
    """A rotation of the first two axes."""
    R = np.eye(n)
    R[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return R


def test_a_basis_is_kept_while_the_matrix_is_nearly_diagonal_in_it():
    A = positive(0)
    Q = np.linalg.eigh(A)[1][:, ::-1]
    for angle in (0.0, 0.01, 0.05, 0.3):
        turned = Q @ rotation(angle) @ np.diag(3.0 ** np.arange(5)[::-1]) @ rotation(angle).T @ Q.T
        B = Q.T @ turned @ Q
        share = np.linalg.norm(B - np.diag(np.diag(B))) / np.linalg.norm(B)
        refined = eigenbases.refine(tf.constant(turned), tf.constant(Q)).numpy()
        assert np.abs(refined - Q).max() > 1e-3 or angle == 0
        for tolerance, kept in ((0.99 * share, False), (1.01 * share + 1e-12, True)):
            if kept or angle:
                found = Refresh(tolerance).basis(tf.constant(turned), tf.constant(Q), sort=True)
                np.testing.assert_array_equal(found, Q if kept else refined)


def test_each_matrix_of_a_stack_is_refreshed_by_itself():
    A = np.stack([positive(0), positive(1), np.full((5, 5), np.nan)])
    Q = np.stack([np.linalg.eigh(positive(0))[1]] * 3)
    found = Refresh(0.1).basis(tf.constant(A), tf.constant(Q), sort=False).numpy()
    np.testing.assert_array_equal(found[0], Q[0])
    np.testing.assert_array_equal(found[1], eigenbases.refine(tf.constant(A[1]), tf.constant(Q[1]), sort=False))
    assert np.isnan(found[2]).all()  # which the optimizer counts, and keeps the old one


def test_a_root_is_kept_while_its_matrix_is_near_the_last_one_and_a_failed_one_is_tried_again():
    def compute(matrices):
        return tf.where(matrices[..., :1, :1] < 0, np.nan, 2.0 * matrices)

    A, old = np.stack([positive(0), 1.2 * positive(0), -positive(1), positive(2)]), np.zeros((4, 5, 5))
    last = np.stack([1.05 * positive(0), positive(0), positive(1), np.zeros((5, 5))])
    roots, seen = Refresh(0.1).root(compute, tf.constant(A), tf.constant(old), tf.constant(last))
    np.testing.assert_array_equal(roots[0], old[0])
    np.testing.assert_array_equal(roots[1::2], 2 * A[1::2])
    assert np.isnan(roots[2]).all()
    np.testing.assert_array_equal(seen, [last[0], A[1], last[2], A[3]])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", some(METHODS, list(METHODS)[::2]))
def test_tolerance_zero_is_every_step(name):
    shapes = [(4, 6), (6, 4), (5,)]
    start, gradients = random_gradients(shapes)
    runs = [trajectory(method(name, every=every), start, gradients, shapes) for every in (1, Refresh(0.0))]
    np.testing.assert_array_equal(*runs)
    runs = [trajectory(method(name, every=every), start, gradients, shapes) for every in (3, Refresh(0.0, 3))]
    np.testing.assert_array_equal(*runs)


@every_method
def test_refreshes_stop_where_the_covariance_is_constant_and_go_on_where_it_rotates(name):
    random, counts = np.random.default_rng(0), {}
    spread = np.diag([3.0, 1.0, 0.3])
    noise = np.tile(random.standard_normal((10, 3, 3)), (25, 1, 1))
    for rotates in (False, True):
        optimizer = method(name, every=Refresh(0.1), beta_2=0.98, learning_rate=1e-3)
        _, step = stepper(optimizer, [(3, 3)])
        counts[rotates] = []
        for t, E in enumerate(noise):
            R = rotation(0.03 * t if rotates else 0.0, 3)
            counts[rotates].append(step([R @ spread @ E @ spread])["refreshes"])
    assert counts[False][0] == 2  # one for each of its two axes
    late = {rotates: sum(seen[100:]) for rotates, seen in counts.items()}
    assert late[True] > 2 * late[False], late
    assert 0 < late[True] < 300


@every_method
def test_a_frozen_gradient_needs_no_refresh(name):
    _, step = stepper(method(name, every=Refresh(0.05)), [(4, 4)])
    gradient = positive(0, 4)
    seen = [step([gradient])["refreshes"] for _ in range(30)]
    assert seen[0] == 2 and sum(seen[10:]) == 0


@pytest.mark.slow
@every_method
def test_xla_takes_the_same_steps(name):
    shapes = [(5, 5), (4,), (5, 5), (3, 4)]
    start, gradients = random_gradients(shapes, steps=6)
    settings = {"epsilon": 1e-2} if name == "shampoo" else {}
    compiled, graph = (
        trajectory(method(name, every=Refresh(0.2), **settings), start, gradients, shapes, jit, "float32")
        for jit in (True, False)
    )
    np.testing.assert_allclose(compiled, graph, atol=2e-5)


def test_the_count_is_in_the_logs_of_a_curved_model_and_a_file_keeps_the_rule(tmp_path):
    model = kc.curved(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]))
    model.compile(kc.SOAP(every=Refresh(0.2, check_every=2)), "mse")
    random = np.random.default_rng(0)
    history = model.fit(random.standard_normal((32, 4)), random.standard_normal((32, 2)), batch_size=8, verbose=0)
    assert 4 <= history.history["refreshes"][0] <= 8
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.every == Refresh(0.2, check_every=2)
    assert "refreshes" not in kc.SOAP().reports and "refreshes" in loaded.reports


def test_the_bad_are_told():
    for wrong in ({"tolerance": 1.0}, {"tolerance": -0.1}, {"check_every": 0}):
        with pytest.raises(ValueError, match=f"`Refresh`: `{next(iter(wrong))}`"):
            Refresh(**wrong)
    for cls in (kc.SOAP, kc.KLShampoo, kc.Shampoo):
        for every in (0, True, 2.5, Refresh):
            with pytest.raises(ValueError, match=f"`{cls.__name__}`: `every` must be an integer >= 1 or a `Refresh`"):
                cls(every=every)
