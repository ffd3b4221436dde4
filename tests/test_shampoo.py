"""Shampoo against the code of Shi et al., step by step."""

import pathlib

import keras
import numpy as np
import pytest
from selection import some
from test_soap import random_gradients, stepper, trajectory

from keras_curvature.optimizers.shampoo import Shampoo
from keras_curvature.solvers.roots import CoupledNewton, EigenRoot

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "shampoo_trajectories.npz")
PLAIN = {"learning_rate": 2.0**-7, "beta_2": 1.0, "epsilon": 1e-6, "every": 1, "grafting": None}
NEWTON = CoupledNewton(relative_epsilon=0.0, tolerance=1e-12)
RUNS = {
    "none": {},
    "none_average": {"beta_2": 0.99},
    "none_no_momentum": {"beta_1": 0.0},
    "none_small_epsilon": {"epsilon": 1e-12},
    "none_every4": {"every": 4},
    "sgd": {"grafting": "sgd"},
    "adam": {"grafting": "adam", "beta_2": 0.999},
    "rmsprop": {"grafting": "rmsprop", "beta_2": 0.99},
    "adagrad": {"grafting": "adam"},
    "adam_every3": {"grafting": "adam", "beta_2": 0.95, "every": 3},
    "sgd_blocked": {"grafting": "sgd", "block_size": 4},
    "adam_blocked_every2": {"grafting": "adam", "beta_2": 0.95, "every": 2, "block_size": 3},
    "half": {"root": EigenRoot(exponent=0.5)},
    "newton": {"root": NEWTON, "epsilon": 1e-2},
    "newton_every2": {"root": NEWTON, "epsilon": 1e-2, "grafting": "adam", "beta_2": 0.95, "every": 2},
}
SHAPES = [(5, 7), (7,), (3, 3, 2, 4)]

pytestmark = pytest.mark.usefixtures("in_float64")


def assert_close(seen, expected, start):
    moved = np.abs(expected - start).max()
    assert moved > 1e-2
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-8 * moved)


@pytest.mark.parametrize("run", some(RUNS, ["none_average", "sgd_blocked", "adam_every3", "rmsprop", "half", "newton"]))
def test_trajectory_is_that_of_the_reference(run):
    start = REFERENCE["plain_start"]
    seen = trajectory(Shampoo(**{**PLAIN, **RUNS[run]}), start, REFERENCE["plain_gradients"], SHAPES)
    assert_close(seen, REFERENCE[f"plain_{run}"], start)


@pytest.mark.parametrize("settings", [{"max_dimension": 5}, {"sides": "shortest"}])
@pytest.mark.parametrize(("run", "part", "shape"), [("first", slice(0, 36), (4, 9)), ("second", slice(36, 54), (6, 3))])
def test_one_sided_trajectory_is_that_of_the_reference_without_the_long_axis(run, part, shape, settings):
    start, gradients = REFERENCE["large_start"][part], REFERENCE["large_gradients"][:, part]
    seen = trajectory(Shampoo(**PLAIN, **settings), start, gradients, [shape])
    assert_close(seen, REFERENCE[f"large_{run}"], start)


def test_one_sided_without_grafting_is_asgo():
    start, gradients = random_gradients([(6, 6), (3,)], steps=6)  # of a square matrix, the outputs
    settings = {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.8, "epsilon": 1e-3, "every": 1, "grafting": None}
    seen = trajectory(Shampoo(**settings, sides="shortest"), start, gradients, [(6, 6), (3,)])
    W, M, V = start[:36].reshape(6, 6), 0.0, 0.0
    for t, (row, weights) in enumerate(zip(gradients, seen), start=1):
        G = row[:36].reshape(6, 6)
        M, V = 0.9 * M + 0.1 * G, 0.8 * V + 0.2 * G.T @ G
        W = W - 0.1 * M / (1 - 0.9**t) @ power(V / (1 - 0.8**t) + 1e-3 * np.eye(6), -0.5)
        np.testing.assert_allclose(weights[:36].reshape(6, 6), W, rtol=1e-6)
    both = trajectory(Shampoo(**settings), start, gradients, [(6, 6), (3,)])
    np.testing.assert_allclose(seen[:, 36:], both[:, 36:], rtol=1e-12)  # vectors have one axis


def power(matrix, exponent):
    """The power of a symmetric matrix by its eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def test_sums_without_grafting_and_momentum_are_the_papers_algorithm():
    start, gradients = random_gradients([(4, 3)])
    optimizer = Shampoo(0.1, beta_1=0.0, beta_2=1.0, epsilon=1e-2, every=1, grafting=None)
    seen = trajectory(optimizer, start, gradients, [(4, 3)])
    w, L, R = start.reshape(4, 3), 1e-2 * np.eye(4), 1e-2 * np.eye(3)
    for row, weights in zip(gradients, seen):
        G = row.reshape(4, 3)
        L, R = L + G @ G.T, R + G.T @ G
        w = w - 0.1 * power(L, -1 / 4) @ G @ power(R, -1 / 4)
        np.testing.assert_allclose(weights, w.ravel(), rtol=1e-7)  # the learning rate is of float32


def test_tiles_are_variables_of_their_own():
    start, gradients = random_gradients([(6, 4)])
    whole = trajectory(Shampoo(every=2, block_size=3), start, gradients, [(6, 4)])
    parts = [(slice(i, i + 3), slice(j, j + 3)) for i in (0, 3) for j in (0, 3)]

    def cut(vector):
        return np.concatenate([vector.reshape(6, 4)[part].ravel() for part in parts])

    shapes = [(3, 3), (3, 1), (3, 3), (3, 1)]
    optimizer = Shampoo(every=2, block_size=3)
    apart = trajectory(optimizer, cut(start), np.array([cut(g) for g in gradients]), shapes)
    expected = np.array([cut(w) for w in whole])
    both_axes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18, 19, 20]  # (3, 1) alone is a vector
    np.testing.assert_allclose(apart[:, both_axes], expected[:, both_axes], rtol=1e-12)


def test_a_block_that_is_large_enough_is_no_block():
    start, gradients = random_gradients([(6, 4)])
    runs = [trajectory(Shampoo(every=2, block_size=n), start, gradients, [(6, 4)]) for n in (6, 1024)]
    np.testing.assert_array_equal(*runs)


def test_a_long_axis_has_no_factor():
    optimizer = Shampoo(max_dimension=5)
    optimizer.build([keras.Variable(np.ones(shape)) for shape in [(4, 9), (9,), (2, 2)]])
    assert [tuple(f.shape) for f in optimizer._factors] == [(4, 4), (2, 2), (2, 2)]
    optimizer = Shampoo(max_dimension=8, block_size=6)
    optimizer.build([keras.Variable(np.ones(shape)) for shape in [(4, 9), (9,), (2, 8)]])
    assert [tuple(f.shape) for f in optimizer._factors] == [(4, 4), (4, 4), (2, 2), (6, 6), (2, 2), (2, 2)]


def test_state_is_as_large_as_the_docstring_says():
    sizes = {}
    for longest in (None, 1000):
        optimizer = Shampoo(max_dimension=longest)
        optimizer.build([keras.Variable(np.zeros((20000, 64), "float32"))])
        sizes[longest] = sum(np.prod(m.shape) for m in [*optimizer._factors, *optimizer._roots]) / (20000 * 64)
    np.testing.assert_allclose([sizes[None], sizes[1000]], [16.25, 0.256], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("root", [EigenRoot(), CoupledNewton()])
def test_xla_takes_the_same_steps(dtype, root):
    start, gradients = REFERENCE["plain_start"], REFERENCE["plain_gradients"][:6]
    compiled, graph = (
        trajectory(Shampoo(epsilon=1e-2, every=2, root=root), start, gradients, SHAPES, jit, dtype).astype("float32")
        for jit in (True, False)
    )
    np.testing.assert_allclose(compiled, graph, atol=2e-5 if dtype == "float32" else 2e-2)
    assert np.abs(graph[-1] - start).max() > 4e-3


@pytest.mark.parametrize("root", [EigenRoot(), CoupledNewton()])
def test_a_failed_root_leaves_the_last_good_one_and_is_reported(root):
    optimizer, random = Shampoo(every=2, root=root), np.random.default_rng(0)
    variables, step = stepper(optimizer, [(4, 3), (3, 4)])

    def gradients():
        return [random.standard_normal((4, 3)), random.standard_normal((3, 4))]

    assert [step(gradients())["failed_refreshes"] for _ in range(4)] == [0, 0, 0, 0]
    before = [r.numpy() for r in optimizer._roots]
    optimizer._factors[2].assign(np.full((3, 3), np.nan))
    seen = [step(gradients()) for _ in range(4)]
    assert [s["failed_refreshes"] for s in seen] == [0, 1, 0, 1]
    assert all(s["skipped_steps"] == 0 and s["step_norm"] > 0 for s in seen)
    for i, (old, new) in enumerate(zip(before, optimizer._roots)):
        assert np.array_equal(old, new.numpy()) == (i == 2)  # its neighbours of the same size are computed with it
    assert all(np.isfinite(v.numpy()).all() for v in variables)


@pytest.mark.parametrize("root", [EigenRoot(), CoupledNewton()])
@pytest.mark.parametrize("scale", some([1e-25, 1e-10, 1e10, 1e15], [1e-25, 1e15]))
def test_singular_factors_of_any_size_do_no_harm(root, scale):
    variables, step = stepper(Shampoo(every=1, root=root), [(6, 5)])
    random = np.random.default_rng(0)
    column = random.standard_normal((6, 1))
    for _ in range(5):
        seen = step([scale * column @ random.standard_normal((1, 5))])  # of rank one
        assert seen["skipped_steps"] == seen["failed_refreshes"] == 0
    assert np.abs(variables[0].numpy() - 1).max() < 0.1


def test_the_bad_are_told():
    wrong = {"beta_1": 1.0, "beta_2": 0.0, "epsilon": 0.0, "every": 0, "block_size": None, "max_dimension": 0,
             "grafting": "adagrad", "root": EigenRoot, "sides": "left"}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`Shampoo`: `{name}`"):
            Shampoo(**{name: value})
