"""Shampoo's roots without factors, Sketchy and Jorge, and factors in half precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_shampoo import power
from test_soap import random_gradients, stepper, trajectory

import keras_curvature as kc
from keras_curvature.solvers.rounding import rounded_at_random

SHAPES = [(5, 7), (7,), (3, 3, 2, 4)]
PLAIN = {"learning_rate": 0.1, "beta_1": 0.0, "beta_2": 0.9, "epsilon": 1e-3, "every": 1, "grafting": None}


# Sketches.


FULL = [{"grafting": None}, {"grafting": "adam", "beta_1": 0.9}, {"beta_2": 1.0}]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("settings", some(FULL, FULL[1:2]))
def test_a_sketch_of_full_rank_is_shampoo(settings):
    start, gradients = random_gradients(SHAPES)
    settings = {**PLAIN, **settings}
    full = trajectory(kc.Shampoo(**settings), start, gradients, SHAPES)
    sketched = trajectory(kc.Shampoo(**settings, root=kc.SketchedRoot(18, 0.0)), start, gradients, SHAPES)
    np.testing.assert_allclose(sketched, full, rtol=1e-9)


@pytest.mark.usefixtures("in_float64")
def test_gradients_of_low_rank_lose_nothing():
    """All gradients in one subspace of two dimensions, of which a sketch of rank two is exact."""
    random = np.random.default_rng(0)
    U, V = random.standard_normal((8, 2)), random.standard_normal((2, 6))
    gradients = np.array([(U @ random.standard_normal((2, 2)) @ V).ravel() for _ in range(6)])
    runs = [
        trajectory(kc.Shampoo(**PLAIN, root=root), np.ones(48), gradients, [(8, 6)])
        for root in (kc.EigenRoot(), kc.SketchedRoot(2, 0.0))
    ]
    np.testing.assert_allclose(*runs, rtol=1e-7)


def frequent_directions(gradients, k, beta, epsilon, p):
    """The root after each gradient, by dense eigenvalues."""
    n = gradients[0].shape[0]
    kept, tail, roots = np.zeros((n, n)), 0.0, []
    for t, G in enumerate(gradients, start=1):
        values, vectors = np.linalg.eigh(beta * kept + (1 - beta) * G @ G.T)
        values, vectors = values[::-1], vectors[:, ::-1]
        cutoff = values[k] if k < n else 0.0
        kept = (vectors[:, :k] * (values[:k] - cutoff)) @ vectors[:, :k].T
        tail = beta * tail + cutoff
        scale = 1 - beta**t
        roots.append(power((kept + tail * np.eye(n)) / scale + epsilon * np.eye(n), -1 / p))
    return roots


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("shape", [(9, 3), (4, 9)])  # fewer columns of the sketch than rows, and more
def test_a_sketch_follows_the_equations_of_frequent_directions(shape):
    start, gradients = random_gradients([shape], steps=6)
    seen = trajectory(kc.Shampoo(**PLAIN, root=kc.SketchedRoot(2, 0.0)), start, gradients, [shape])
    G = [row.reshape(shape) for row in gradients]
    left = frequent_directions(G, 2, 0.9, 1e-3, 4)
    right = frequent_directions([g.T for g in G], 2, 0.9, 1e-3, 4)
    w = start.reshape(shape)
    for L, g, R, weights in zip(left, G, right, seen):
        w = w - 0.1 * L @ g @ R
        np.testing.assert_allclose(weights, w.ravel(), rtol=1e-7)


@pytest.mark.usefixtures("in_float64")
def test_the_sketch_is_below_the_moment_and_the_tail_makes_up_for_it():
    """The bounds of frequent directions, `kept <= A <= kept + tail I`, which hold for every sketch."""
    optimizer, random = kc.Shampoo(**PLAIN, root=kc.SketchedRoot(3)), np.random.default_rng(0)
    _, step = stepper(optimizer, [(8, 5)])
    A = np.zeros((8, 8))
    for _ in range(10):
        G = random.standard_normal((8, 5)) * np.array([3.0, 2, 1, 0.5, 0.1])
        step([G])
        A = 0.9 * A + 0.1 * G @ G.T
        U, values, tail = (v.numpy().astype("float64") for v in optimizer._running[0])
        kept, rounding = U * values @ U.T, 1e-5 * np.linalg.norm(A)
        assert np.linalg.eigvalsh(A - kept).min() > -rounding
        assert np.linalg.eigvalsh(kept + tail * np.eye(8) - A).min() > -rounding
    assert tail > 0.1


# The binomial series.


@pytest.mark.usefixtures("in_float64")
def test_jorge_follows_its_equations():
    start, gradients = random_gradients([(4, 6), (3,)], steps=6)
    settings = {**PLAIN, "root": kc.BinomialRoot(2.0)}
    seen = trajectory(kc.Shampoo(**settings), start, gradients, [(4, 6), (3,)])
    w, L, R = start[:24].reshape(4, 6), 2.0 * np.eye(4), 2.0 * np.eye(6)

    def next_root(P, T):
        Y = P @ P @ P @ P @ T @ T.T
        b = np.linalg.norm(Y) / (1 + np.linalg.norm(Y))
        X = (1 - b) / b * Y
        np.testing.assert_allclose(np.linalg.norm(X), 1)
        P = b**-0.25 * P @ (np.eye(len(P)) - X / 4 + 5 / 32 * X @ X)
        return (P + P.T) / 2

    for row, weights in zip(gradients, seen):
        G = row[:24].reshape(4, 6)
        L, R = next_root(L, G), next_root(R, G.T)
        w = w - 0.1 * L @ G @ R
        np.testing.assert_allclose(weights[:24], w.ravel(), rtol=1e-7)


def test_jorges_root_is_near_the_exact_one_of_its_average():
    """One step of the series from the exact root, against eigenvalues, of the average with Jorge's own decays."""
    root, random = kc.BinomialRoot(), np.random.default_rng(0)
    A, errors = np.eye(5), []
    for _ in range(20):
        T = random.standard_normal((5, 7)) * [[4.0], [2.0], [1.0], [1.0], [0.5]]
        size = np.linalg.norm(np.linalg.inv(A) @ T @ T.T)
        before, b = power(A, -0.25), size / (1 + size)
        A = b * A + (1 - b) * T @ T.T
        (P,) = root.updated([tf.constant(before)], tf.constant(T), 0.9, 4)
        errors.append(np.linalg.norm(P - power(A, -0.25)) / np.linalg.norm(P))
    assert max(errors) < 0.08 and np.median(errors) < 0.04  # 1 - 1/4 + 5/32 is 1.08 times 2**-0.25


# Both.

ROOTS = [kc.SketchedRoot(2), kc.BinomialRoot()]


@pytest.mark.parametrize("root", ROOTS)
def test_until_the_first_root_the_grafted_step_is_taken(root):
    start, gradients = random_gradients([(4, 3)], steps=5)
    settings = {"every": 3, "grafting": "sgd", "beta_1": 0.0, "learning_rate": 0.1}
    seen = trajectory(kc.Shampoo(**settings, root=root), start, gradients, [(4, 3)], dtype="float32")
    sgd = start - 0.1 * np.cumsum(gradients, axis=0)
    np.testing.assert_allclose(seen[:2], sgd[:2], atol=1e-5)
    assert np.abs(seen[2] - sgd[2]).max() > 1e-3
    lengths = np.linalg.norm(np.diff(seen, axis=0, prepend=start[None]), axis=1)
    np.testing.assert_allclose(lengths, 0.1 * np.linalg.norm(gradients, axis=1), rtol=1e-4)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("scale", [1e-25, 1e10])
def test_singular_gradients_of_any_size_do_no_harm(root, scale):
    variables, step = stepper(kc.Shampoo(every=1, root=root), [(6, 5)])
    random = np.random.default_rng(0)
    column = random.standard_normal((6, 1))
    for _ in range(5):
        seen = step([scale * column @ random.standard_normal((1, 5))])
        assert seen["skipped_steps"] == seen["failed_refreshes"] == 0
    step([np.zeros((6, 5))])
    moved = np.abs(variables[0].numpy() - 1).max()
    assert moved < 0.1 and (moved > 1e-4 or scale < 1)  # Adam's epsilon is larger than the smallest of them


@pytest.mark.parametrize("root", ROOTS)
def test_a_failed_root_leaves_the_last_good_one(root):
    T = tf.constant(np.stack([np.ones((3, 2)), np.full((3, 2), np.inf)]), "float32")
    state = [
        tf.stack([tf.ones(shape) if initial == "zeros" else initial(shape, tf.float32)] * 2)
        for _, shape, initial in root.state(3, 1e-6)
    ]
    for new in root.updated(state, T, 0.9, 4):
        assert np.isfinite(new[0]).all() and np.isnan(new[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("root", ROOTS)
def test_xla_takes_the_same_steps(root):
    start, gradients = random_gradients(SHAPES, steps=6)
    compiled, graph = (
        trajectory(kc.Shampoo(epsilon=1e-2, every=2, root=root), start, gradients, SHAPES, jit, "float32")
        for jit in (True, False)
    )
    np.testing.assert_allclose(compiled, graph, atol=2e-5)


# Half precision.


def test_rounding_at_random_keeps_the_mean_and_what_bfloat16_holds():
    x = tf.constant([1.0, 1.001, -3.1415, 1e-30, 0.0, np.inf, np.nan])
    found = np.stack([rounded_at_random(x, step, 0) for step in range(2000)])
    np.testing.assert_array_equal(found, tf.cast(tf.cast(found, tf.bfloat16), tf.float32))
    np.testing.assert_allclose(found[:, :5].mean(0), x[:5], rtol=3e-4)
    assert (found[:, [0, 4, 5]] == x.numpy()[[0, 4, 5]]).all() and np.isnan(found[:, 6]).all()
    assert len({*found[:, 1]}) == 2


def test_factors_in_bfloat16_follow_those_in_float32_and_take_half_the_memory(tmp_path):
    random, factors = np.random.default_rng(0), {}
    spread = np.diag([4.0, 2.0, 1.0, 0.5])
    gradients = [spread @ random.standard_normal((4, 4)) for _ in range(600)]
    for dtype in ("float32", "bfloat16"):
        optimizer = kc.Shampoo(beta_2=0.995, epsilon=1e-6, every=50, factors_dtype=dtype)
        _, step = stepper(optimizer, [(4, 4)])
        assert all(keras.backend.standardize_dtype(v.dtype) == dtype for v in [*optimizer._factors, *optimizer._roots])
        for G in gradients:
            step([G])
        factors[dtype] = [np.array(tf.cast(v.value, tf.float32)) for v in [*optimizer._factors, *optimizer._roots]]
    for wide, half in zip(factors["float32"], factors["bfloat16"]):
        assert np.linalg.norm(half - wide) < 0.06 * np.linalg.norm(wide)


def test_a_file_keeps_factors_in_bfloat16_bit_for_bit(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    model.compile(kc.Shampoo(every=2, factors_dtype="bfloat16"), "mse")
    random = np.random.default_rng(0)
    x, y = random.standard_normal((32, 4)), random.standard_normal((32, 2))
    model.fit(x, y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(tf.cast(a.value, tf.float32), tf.cast(b.value, tf.float32))
    assert [m.train_on_batch(x, y) for m in (model, loaded)][0] == pytest.approx(model.test_on_batch(x, y), rel=0.5)
    np.testing.assert_array_equal(*(m.get_weights()[0] for m in (model, loaded)))


def test_the_bad_are_told():
    for component, argument, value in (
        (kc.SketchedRoot, "rank", 0), (kc.SketchedRoot, "relative_epsilon", -1.0), (kc.BinomialRoot, "initial", 0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{component.__name__}`: `{argument}`"):
            component(**{argument: value})
    with pytest.raises(ValueError, match="`Shampoo`: `every` must be an integer with `root=SketchedRoot"):
        kc.Shampoo(root=kc.SketchedRoot(), every=kc.Refresh())
    with pytest.raises(ValueError, match="`Shampoo`: `factors_dtype` must be"):
        kc.Shampoo(factors_dtype="float16")
    with pytest.raises(ValueError, match='`Shampoo`: `factors_dtype` must be "float32" with `root=BinomialRoot'):
        kc.Shampoo(factors_dtype="bfloat16", root=kc.BinomialRoot())
