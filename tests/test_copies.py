"""Multiple eigenvalues: `eigenpairs` against spectra known in closed form, with every copy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import float64
from test_lanczos import network_like, operator, pieces, random, reflected, rows

import keras_curvature as kc
from keras_curvature.solvers import lanczos


def doubled(n=300, copies=4):
    """Three outliers at each end, the larger ones several times, and a bulk between them."""
    outliers = np.repeat([8.0, 5.0, 3.0], [copies, 2, 1])
    return np.concatenate([outliers, -0.5 * outliers, np.linspace(-0.3, 0.3, n - 2 * len(outliers))])


@pytest.mark.parametrize("most_negative", [False, True])
@pytest.mark.parametrize("k, dtype", [(2, "float64"), (6, "float64"), (7, "float32")])
def test_every_copy_is_found(k, dtype, most_negative):
    values = doubled()
    A = reflected(values).astype(dtype)
    made = []
    counted = kc.operators.Function(lambda v: made.append(0) or operator(A, dtype) @ v)
    like = pieces(300, tf.as_dtype(dtype))
    found = lanczos.eigenpairs(counted, like, k, tolerance=1e-5, most_negative=most_negative)
    expected = np.sort(values)[:k] if most_negative else np.sort(values)[::-1][:k]
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    assert found.converged.all() and found.products == len(made) <= 100 and not found.exhausted
    V = rows(found.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(k), atol=1e-5)
    true = np.linalg.norm(V @ A.astype("float64") - found.values[:, None] * V, axis=1)
    assert np.all(true <= found.residuals) and np.all(found.residuals <= true + 1e-4)


def test_copies_under_a_metric():
    values, M = doubled(), reflected(np.linspace(0.5, 2, 300), 7)
    root = np.linalg.cholesky(M)
    A = np.linalg.solve(root.T, reflected(values)) @ np.linalg.inv(root)  # so L'AL has the values
    found = lanczos.eigenpairs(operator(A), pieces(300), 5, tolerance=1e-6, metric=operator(M))
    np.testing.assert_allclose(found.values, [8, 8, 8, 8, 5], rtol=1e-6)
    V = rows(found.vectors)
    np.testing.assert_allclose(V @ M @ V.T, np.eye(5), atol=1e-8)
    np.testing.assert_allclose(V @ M @ A, found.values[:, None] * V, atol=1e-3)


def test_what_the_search_for_copies_costs_where_there_are_none(monkeypatch):
    """Ten products for a network-like spectrum, and none for the largest eigenvalue alone."""
    for seed in range(4):
        A = operator(network_like(seed))
        assert lanczos.eigenpairs(A, pieces(400), 1).products < 15
        with monkeypatch.context() as only:
            only.setattr(lanczos.Found, "run_in_complement", lambda *_: False)
            first = lanczos.eigenpairs(A, pieces(400), 6)
        both = lanczos.eigenpairs(A, pieces(400), 6)
        assert both.products == first.products + 10
        np.testing.assert_array_equal(both.values, first.values)


def test_the_limit_holds_for_all_runs_together():
    A = operator(reflected(doubled()))
    for most in (5, 30, 40, 60):
        found = lanczos.eigenpairs(A, pieces(300), 6, tolerance=1e-8, max_products=most)
        assert found.products <= most
        order = np.sort(found.values)[::-1]
        np.testing.assert_array_equal(found.values, order)


def test_pairs_that_are_rough_have_no_ghosts():
    """The complement of inexact vectors has eigenvalues of its own; none of them counts as a copy."""
    for seed in range(3):
        values = network_like(seed)
        found = lanczos.eigenpairs(operator(reflected(values, seed)), pieces(400), 6, tolerance=0.1)
        np.testing.assert_allclose(found.values, np.sort(values)[::-1][:6], rtol=0.05)


def test_the_last_layer_under_the_squared_error():
    """Its Hessian is `2/6 X'X / N (x) I`: each eigenvalue as often as there are outputs."""
    with float64():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(6)])
        model.compile("sgd", "mse")
        x = random(0, 64, 3)
        c = kc.curvature(model, (x, random(1, 64, 6)))
        X = np.concatenate([x, np.ones((64, 1))], 1)
        values = np.repeat(np.linalg.eigvalsh(X.T @ X / 64 * 2 / 6), 6)
        for k in (2, 10, 50):
            np.testing.assert_allclose(c.top(k).values, values[::-1][:k], rtol=1e-10)
            np.testing.assert_allclose(c.top(k, most_negative=True).values, values[:k], rtol=1e-10)
        assert c.top(10).products <= 4 * 7
        assert c.sharpness().products <= 10
