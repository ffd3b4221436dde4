"""TNT against its equations in NumPy, and against K-FAC's factors where inputs and slopes are independent."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from test_curveball import stepper
from test_kfac import matrix, net, single, softmax

import keras_curvature as kc
from keras_curvature import Linearization
from keras_curvature.linearization.fisher import likelihoods

pytestmark = pytest.mark.usefixtures("in_float64")


def dense_layer(optimizer, seed=0):
    model, x, y, _ = single(optimizer, "softmax", seed)
    return model, x, y


def test_steps_are_those_of_the_equations():
    damping, beta = 0.05, 0.5
    optimizer = kc.TNT(0.01, damping=damping, momentum=0.8, beta=beta, factors_every=2, inverses_every=4, kl_clip=None)
    model, x, y = dense_layer(optimizer)
    random, labels = np.random.default_rng(1), tf.Variable(np.zeros(7), dtype=tf.int32)
    step, V, inverses, looks = stepper(model, optimizer), None, None, 0
    M_w, M_b = np.zeros((4, 3)), np.zeros(3)
    for t in range(9):
        x, drawn = random.standard_normal((7, 4)), random.integers(3, size=7)
        labels.assign(drawn)
        W, b = model.get_weights()
        p = softmax(x @ W + b)
        M_w, M_b = 0.8 * M_w + x.T @ (p - y) / 7, 0.8 * M_b + (p - y).mean(0)
        if t % 2 == 0:
            looks += 1
            s = (p - np.eye(3)[drawn]) / 7
            S, c = x.T @ s, s.sum(0)
            new, eps = [S @ S.T, S.T @ S, np.outer(c, c)], min(1 - 1 / looks, beta)
            V = new if looks == 1 else [eps * a + (1 - eps) * n for a, n in zip(V, new)]
        if t % 4 == 0:
            c = np.sqrt(np.trace(V[0]) / 12)
            U = [V[0] / (c * 3), V[1] / (c * 4), V[2]]
            inverses = [np.linalg.inv(X + damping * np.eye(len(X))) for X in U]
        with mock.patch.object(likelihoods.Categorical, "sample", lambda *_: labels + 0):
            step(x, y)
        after = model.get_weights()
        np.testing.assert_allclose(after[0], W - 0.01 * inverses[0] @ M_w @ inverses[1], rtol=1e-9)
        np.testing.assert_allclose(after[1], b - 0.01 * inverses[2] @ M_b, rtol=1e-9)


def test_a_tensor_normal_covariance_is_found_again():
    """The factors of gradients `A^1/2 Z G^1/2` are `A` and `G` with equal mean eigenvalues."""
    random = np.random.default_rng(0)
    roots = [random.standard_normal((n, n)) for n in (4, 3)]
    A, G = (X @ X.T for X in roots)
    optimizer = kc.TNT(0.0, damping=1e-12, factors_every=1, inverses_every=1, beta=0.9999)
    model = net([np.zeros((4, 3)), np.zeros(3)])
    optimizer.build(model.trainable_variables)
    draws = np.einsum("ik,nkl,jl->nij", roots[0], random.standard_normal((200_000, 4, 3)), roots[1])
    moments = [np.einsum("nij,nkj->ik", draws, draws) / len(draws), np.einsum("nij,nik->jk", draws, draws) / len(draws)]
    factors = [tf.constant(V) for V in (*moments, np.eye(3))]
    U = [V / scale for V, scale in zip(factors, optimizer._scales(factors))]
    np.testing.assert_allclose(np.kron(U[0], U[1]), np.kron(A, G), rtol=0.05, atol=0.05 * np.abs(np.kron(A, G)).max())
    means = [np.trace(X) / len(X) for X in U[:2]]
    np.testing.assert_allclose(*means)


def test_zero_gradients_and_long_axes_do_no_harm():
    optimizer = kc.TNT(0.1, factors_every=1, inverses_every=1, max_dimension=3)
    model, x, y = dense_layer(optimizer)
    step = stepper(model, optimizer)
    assert step(x, y)["failed_refreshes"] == 0
    assert [v.shape for v in optimizer._factors] == [(3, 3), (3, 3)]  # of the outputs and the bias
    seen = step(np.zeros((7, 4)), np.full((7, 3), 1 / 3))
    assert seen["failed_refreshes"] == seen["skipped_steps"] == 0
    assert np.isfinite(matrix(model)).all()


def test_without_a_likelihood_it_is_told():
    model = kc.curved(net([np.ones((4, 3)), np.ones(3)]))
    model.compile(kc.TNT(), "hinge")
    with pytest.raises(ValueError, match="likelihood"):
        model.optimizer.step(Linearization(model, np.ones((2, 4)), np.ones((2, 3))))


@pytest.mark.parametrize(
    "arguments",
    [{"damping": 0.0}, {"momentum": 1.0}, {"beta": 1.0}, {"factors_every": 0}, {"inverses_every": 0},
     {"max_dimension": 0}, {"merge": 1.5}],
)  # fmt: skip
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`TNT`: `{next(iter(arguments))}`"):
        kc.TNT(**arguments)
