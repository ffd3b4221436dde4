"""Methods with a window of gradients against dense matrices in float64, and against sums written out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat

from keras_curvature import GGT, MFAC
from keras_curvature.optimizers import ggt

SHAPES = [(3, 2), (2,), (0, 2), ()]
N = 9


def steps(optimizer, count, seed=0):
    """`(gradients, steps)` of some steps with random gradients on weights in float64, each `(count, N)`."""
    random = np.random.default_rng(seed)
    variables = [keras.Variable(random.standard_normal(shape), dtype="float64") for shape in SHAPES]
    optimizer.build(variables)
    gradients, found = [], []
    for _ in range(count):
        g = [random.standard_normal(shape) for shape in SHAPES]
        before = flat(variables)
        optimizer.apply([tf.constant(a, tf.float64) for a in g], variables)
        gradients.append(np.concatenate([np.ravel(a) for a in g]))
        found.append(flat(variables) - before)
    return np.array(gradients), np.array(found)


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_mfac_inverts_the_fisher_matrix_of_the_last_gradients(window, decay):
    g, found = steps(MFAC(1.0, window=window, damping=0.03, decay=decay, kl_clip=None), 11)
    for t in range(11):
        last = g[max(0, t + 1 - window) : t + 1]
        weights = decay ** (2.0 * np.arange(len(last))[::-1])
        F = 0.03 * np.eye(N) + (last.T * weights) @ last / weights.sum()
        np.testing.assert_allclose(found[t], -np.linalg.solve(F, g[t]), rtol=1e-9, atol=1e-11)


def test_a_full_window_of_mfac_is_its_recursion_of_rank_one():
    """`H <- H - H g g'H / (m + g'H g)`, from `H = I / lambda`, as the code's slow reference has it."""
    g, found = steps(MFAC(1.0, window=6, damping=0.1, kl_clip=None), 6)
    H = np.eye(N) / 0.1
    for row in g:
        H -= np.outer(H @ row, H @ row) / (6 + row @ H @ row)
    np.testing.assert_allclose(found[5], -H @ g[5], rtol=1e-9)


def test_mfac_in_float32_needs_no_full_precision_at_a_small_damping():
    random = np.random.default_rng(1)
    start = random.standard_normal(50)
    gradients = random.standard_normal((5, 50)).astype("float32")
    found = []
    for dtype in ("float64", "float32"):
        variable, optimizer = keras.Variable(start, dtype=dtype), MFAC(1e-6, window=4, damping=1e-7, kl_clip=None)
        optimizer.build([variable])
        for g in gradients:
            before = variable.numpy().astype("float64")
            optimizer.apply([tf.constant(g, dtype)], [variable])
        step = variable.numpy() - before
        found.append(step)
    span = gradients[1:].astype("float64")
    F = 1e-7 * np.eye(50) + span.T @ span / 4
    np.testing.assert_allclose(found[0], -1e-6 * np.linalg.solve(F, span[-1]), rtol=1e-4, atol=1e-12)
    # the weights are of size 1, so that is what is left of a step of 1e-7
    np.testing.assert_allclose(found[1], found[0], atol=3e-7)


def test_tonga_weighs_older_gradients_less():
    assert MFAC.tonga().get_config()["decay"] ** 2 == pytest.approx(0.995)
    assert MFAC.tonga(window=3, decay=0.5).window == 3


def ggt_of_the_code(moments, window, epsilon, decay=1.0):
    """The step for the last moment, as the authors' code computes it from a decomposition, without its tail."""
    last = moments[-window:]
    weights = decay ** np.arange(len(last))[::-1]
    M = (last.T * weights) / np.sqrt((weights**2).sum())
    values, U = np.linalg.eigh(M.T @ M + 1e-6 * np.eye(len(last)))
    head = M @ U @ np.diag((np.sqrt(values) + epsilon) ** -3.0) @ U.T @ M.T @ moments[-1]
    return -head


@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_ggt_is_the_inverse_root_in_the_span_of_the_last_moments(window, decay):
    g, found = steps(GGT(1.0, window=window, beta_1=0.8, decay=decay), 8)
    moments, m = [], np.zeros(N)
    for t in range(8):
        m = 0.8 * m + 0.2 * g[t]
        moments.append(m)
        expected = ggt_of_the_code(np.array(moments), window, 1e-2, decay)
        np.testing.assert_allclose(found[t], expected, rtol=1e-7, atol=1e-9)


def test_ggt_without_epsilon_is_the_dense_inverse_root(monkeypatch):
    monkeypatch.setattr(ggt, "ROUNDING", 0.0)
    g, found = steps(GGT(1.0, window=4, beta_1=0.0, epsilon=0.0), 4)
    values, vectors = np.linalg.eigh(g.T @ g / 4)
    inside = values > 1e-10
    root = vectors[:, inside] @ np.diag(values[inside] ** -0.5) @ vectors[:, inside].T
    np.testing.assert_allclose(found[3], -root @ g[3], rtol=1e-8)
    g, found = steps(GGT(1.0, window=1, beta_1=0.0, epsilon=0.0), 2)
    np.testing.assert_allclose(found[1], -g[1] / np.linalg.norm(g[1]), rtol=1e-10)


def test_a_gradient_of_zero_is_no_harm():
    for optimizer in (MFAC(window=3), GGT(window=3)):
        variable = keras.Variable(np.ones(4), dtype="float64")
        optimizer.build([variable])
        for g in (np.arange(4.0), np.zeros(4), np.zeros(4), np.zeros(4), np.arange(4.0)):
            optimizer.apply([tf.constant(g)], [variable])
        assert np.isfinite(variable.numpy()).all() and variable.numpy()[3] < 1


@pytest.mark.parametrize(("make", "expected"), [
    (lambda: MFAC(window=0), "window=0"),
    (lambda: MFAC(damping=0.0), "damping=0.0"),
    (lambda: MFAC(decay=0.0), "decay=0.0"),
    (lambda: GGT(window=2.5), "window=2.5"),
    (lambda: GGT(beta_1=1.0), "beta_1=1.0"),
    (lambda: GGT(epsilon=-1.0), "epsilon=-1.0"),
    (lambda: GGT(decay=1.5), "decay=1.5"),
])  # fmt: skip
def test_bad_arguments_fail_at_construction(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
