"""SOAP against its authors' code, step by step."""

import functools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some

from keras_curvature.linearization import Gradients
from keras_curvature.optimizers.kl_shampoo import KLShampoo
from keras_curvature.optimizers.shampoo import Shampoo
from keras_curvature.optimizers.soap import SOAP

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "soap_trajectories.npz")
SHAPES = {"plain": [(6, 6), (7,), (3, 3, 2, 4)], "merged": [(2, 2, 2, 8), (8, 4, 2)], "large": [(4, 8), (9,)]}
RUNS = {
    "plain_every1": {"every": 1, "merge": 1},
    "plain_every2": {"every": 2, "merge": 1},
    "plain_every10": {"every": 10, "merge": 1},
    "plain_betas": {"every": 3, "merge": 1, "learning_rate": 1e-2, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-3},
    "merged_every2": {"every": 2, "merge": 8, "max_dimension": 8},
    "large_every2": {"every": 2, "merge": 1, "max_dimension": 5},
}


pytestmark = pytest.mark.usefixtures("in_float64")


def cut(vector, shapes):
    """One vector as arrays of these shapes."""
    ends = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(vector, ends), shapes)]


def trajectory(optimizer, start, gradients, shapes, jit_compile=False, dtype="float64"):
    """The weights after each of the steps with the given gradients, `(steps, weights)`."""
    variables = [keras.Variable(w.astype(dtype), dtype=dtype) for w in cut(start, shapes)]

    @tf.function(jit_compile=jit_compile)
    def step(*given):
        optimizer.apply(list(given), variables)

    optimizer.build(variables)
    seen = []
    for row in gradients:
        step(*[tf.constant(g, dtype) for g in cut(row, shapes)])
        seen.append(np.concatenate([v.numpy().ravel() for v in variables]))
    return np.array(seen)


@pytest.mark.parametrize("run", some(RUNS, ["plain_every10", "plain_betas", "merged_every2", "large_every2"]))
def test_trajectory_is_that_of_the_authors_code(run):
    problem = run.split("_")[0]
    start, gradients = REFERENCE[f"{problem}_start"], REFERENCE[f"{problem}_gradients"]
    seen = trajectory(SOAP(**RUNS[run]), start, gradients, SHAPES[problem])
    moved = np.abs(REFERENCE[run] - start).max()
    assert moved > 1e-2
    np.testing.assert_allclose(seen, REFERENCE[run], rtol=0, atol=1e-11 * moved)


def random_gradients(shapes, steps=8, seed=0):
    """`(start, gradients)` as vectors."""
    random = np.random.default_rng(seed)
    size = sum(int(np.prod(s)) for s in shapes)
    return random.standard_normal(size), random.standard_normal((steps, size))


def test_the_first_step_moves_nothing_and_vectors_are_adams():
    shapes = [(5,), (), (1, 3)]
    start, gradients = random_gradients(shapes)
    seen = trajectory(SOAP(1e-2, beta_1=0.8, beta_2=0.9), start, gradients, shapes)
    np.testing.assert_array_equal(seen[0], start)
    adam = keras.optimizers.Adam(1e-2, beta_1=0.8, beta_2=0.9, epsilon=1e-8)
    np.testing.assert_allclose(seen[1:], trajectory(adam, start, gradients[1:], shapes), atol=1e-7)  # float32 decays


TILED = [SOAP, functools.partial(SOAP, factors="kl"), KLShampoo]


@pytest.mark.parametrize("make", some(TILED, TILED[1:2]))
def test_tiles_are_variables_of_their_own(make):
    start, gradients = random_gradients([(6, 4)])
    whole = trajectory(make(every=2, block_size=2), start, gradients, [(6, 4)])
    part = (slice(2, 4), slice(2, 4))

    def cut_out(vectors):
        return np.array([v.reshape(6, 4)[part].ravel() for v in vectors])

    apart = trajectory(make(every=2), cut_out([start])[0], cut_out(gradients), [(2, 2)])
    np.testing.assert_allclose(cut_out(whole), apart, rtol=1e-12)
    large = trajectory(make(every=2, block_size=6), start, gradients, [(6, 4)])
    np.testing.assert_array_equal(large, trajectory(make(every=2), start, gradients, [(6, 4)]))


def test_merged_axes_are_the_reshaped_tensor():
    start, gradients = random_gradients([(2, 3, 4, 6)])  # 24 by 6, of rank 6: the bases differ where it says nothing
    merged = trajectory(SOAP(every=2, merge=24), start, gradients, [(2, 3, 4, 6)])
    np.testing.assert_allclose(merged, trajectory(SOAP(every=2), start, gradients, [(24, 6)]), rtol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"factors": "kl"}])
def test_one_sided_is_without_a_matrix_for_the_long_axis(settings):
    start, gradients = random_gradients([(4, 9), (7, 3), (5,)])
    seen = trajectory(SOAP(every=2, sides="shortest", **settings), start, gradients, [(4, 9), (7, 3), (5,)])
    expected = trajectory(SOAP(every=2, max_dimension=5, **settings), start, gradients, [(4, 9), (7, 3), (5,)])
    np.testing.assert_array_equal(seen, expected)
    assert np.abs(seen[-1] - start).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_takes_the_same_steps(dtype):
    shapes = [(6, 6), (7,), (3, 3, 2, 4)]
    start, gradients = REFERENCE["plain_start"], REFERENCE["plain_gradients"][:6]
    compiled, graph = (
        trajectory(SOAP(every=2, merge=1), start, gradients, shapes, jit, dtype).astype("float32")
        for jit in (True, False)
    )
    np.testing.assert_allclose(compiled, graph, atol=2e-5 if dtype == "float32" else 2e-2)
    assert np.abs(graph[-1] - start).max() > 5e-3


def test_with_kl_factors_it_is_adam_in_the_bases_of_kl_shampoo():
    shape, b1, b2 = (4, 3), 0.9, 0.98
    start, gradients = random_gradients([shape], steps=20)
    seen = trajectory(SOAP(1.0, b1, b2, 1e-3, every=2, merge=1, factors="kl"), start, gradients, [shape])
    w, m, v, values, Q, S = start.reshape(shape), np.zeros(shape), np.zeros(shape), [0.1] * 2, None, [0.0, 0.0]
    for t, (row, weights) in enumerate(zip(gradients, seen)):
        G = row.reshape(shape)
        if t:
            turned = Q[0].T @ G @ Q[1]
            m, v = b1 * m + (1 - b1) * turned, b2 * v + (1 - b2) * turned**2
            rate = np.sqrt(1 - b2**t) / (1 - b1**t)
            w = w - rate * Q[0] @ (m / (np.sqrt(v) + 1e-3)) @ Q[1].T
        inverses = [q / c @ q.T for q, c in zip(Q, values)] if t else [np.eye(n) for n in shape]
        new = [G @ inverses[1] @ G.T / shape[1], G.T @ inverses[0] @ G / shape[0]]
        S = [b2 * s + (1 - b2) * n for s, n in zip(S, new)]
        if t:
            diagonals = [np.diag(q.T @ n @ q) for q, n in zip(Q, new)]
            values = [np.maximum(b2 * c + (1 - b2) * d, 1e-2) for c, d in zip(values, diagonals)]
        if t % 2 == 0:
            plain = Q[0] @ m @ Q[1].T if t else m
            Q = [np.linalg.qr(s @ q)[0] for s, q in zip(S, Q)] if t else [np.linalg.eigh(s)[1][:, ::-1] for s in S]
            m = Q[0].T @ plain @ Q[1]
        np.testing.assert_allclose(weights, w.ravel(), rtol=1e-8, atol=1e-8, err_msg=f"step {t}")


@pytest.mark.slow
def test_where_the_gradients_have_a_kronecker_covariance_both_kinds_of_factors_agree_up_to_scale():
    random, shape = np.random.default_rng(0), (4, 3)
    spread = [np.diag(np.geomspace(1, 8, n)) @ np.linalg.qr(random.standard_normal((n, n)))[0] for n in shape]
    noise = random.standard_normal((3000, *shape))
    gradients, factors = (spread[0] @ noise @ spread[1].T).reshape(3000, -1), {}
    for kind in ("shampoo", "kl"):
        optimizer = SOAP(0.0, beta_2=0.999, every=1, factors=kind)
        trajectory(optimizer, np.zeros(12), gradients, [shape])
        factors[kind] = [f.numpy() / np.trace(f.numpy()) for f in optimizer._factors]
    for one, other, true in zip(*factors.values(), spread):
        true = true @ true.T / np.trace(true @ true.T)
        np.testing.assert_allclose(one, true, atol=0.05)
        np.testing.assert_allclose(other, true, atol=0.05)


def test_with_the_sign_a_step_has_equal_singular_values_and_the_length_of_soaps_own():
    shapes = [(4, 6), (5,), (6, 3)]
    start, gradients = random_gradients(shapes)
    plain, signed = (trajectory(SOAP(0.1, every=3, sign=sign), start, gradients, shapes) for sign in (False, True))
    hidden = slice(0, 24)
    np.testing.assert_array_equal(signed[:, 24:], plain[:, 24:])  # the vector, and the output layer
    for own, other in zip(np.diff(signed[:, hidden], axis=0), np.diff(plain[:, hidden], axis=0)):
        np.testing.assert_allclose(np.linalg.norm(own), np.linalg.norm(other), rtol=1e-6)
        U, _, V = np.linalg.svd(other.reshape(4, 6), full_matrices=False)
        values = np.linalg.svd(own.reshape(4, 6), compute_uv=False)
        assert values.max() / values.min() < 1.26
        assert np.sum(own.reshape(4, 6) * (U @ V)) > 0.99 * np.linalg.norm(own) * 2  # |U V| is 2


def stepper(optimizer, shapes):
    """`(variables, step)` in float32; `step(gradients)` gives what the optimizer reports."""
    variables = [keras.Variable(np.ones(s, "float32"), dtype="float32") for s in shapes]
    optimizer.build(variables)
    run = tf.function(lambda given: optimizer.step(Gradients("test", given, variables)))
    return variables, lambda given: {k: float(v) for k, v in run([tf.constant(g, "float32") for g in given]).items()}


def test_a_factor_that_is_not_finite_leaves_the_last_basis_and_is_reported():
    optimizer = SOAP(every=2)
    variables, step = stepper(optimizer, [(4, 3), (2, 5)])
    random = np.random.default_rng(0)
    for _ in range(3):
        assert step([random.standard_normal((4, 3)), random.standard_normal((2, 5))])["failed_refreshes"] == 0
    bases = [b.numpy() for b in optimizer._bases]
    optimizer._factors[1].assign(np.full((3, 3), np.nan))
    step([random.standard_normal((4, 3)), random.standard_normal((2, 5))])  # none is due
    seen = step([random.standard_normal((4, 3)), random.standard_normal((2, 5))])
    assert seen["failed_refreshes"] == 1 and seen["skipped_steps"] == 0
    for i, (before, basis) in enumerate(zip(bases, optimizer._bases)):
        assert np.array_equal(basis.numpy(), before) == (i == 1)
    assert all(np.isfinite(v.numpy()).all() for v in variables)


@pytest.mark.parametrize("scale", some([1e-25, 1e-10, 1e10, 1e15], [1e-25, 1e15]))
def test_singular_factors_of_any_size_do_no_harm(scale):
    optimizer = SOAP(every=1)
    variables, step = stepper(optimizer, [(6, 5)])
    random = np.random.default_rng(0)
    column = random.standard_normal((6, 1))
    for _ in range(5):
        seen = step([scale * column @ random.standard_normal((1, 5))])  # of rank one
        assert seen["skipped_steps"] == seen["failed_refreshes"] == 0
    assert np.abs(variables[0].numpy() - 1).max() < 0.5


@pytest.mark.parametrize("method", [SOAP, KLShampoo, Shampoo])
def test_a_first_step_that_is_skipped_is_no_first_step(method, monkeypatch):
    random, precondition, seen = np.random.default_rng(0), method.precondition, []
    good = [[random.standard_normal((4, 3)), random.standard_normal(3)] for _ in range(5)]

    def overflowing(self, gradients):
        return [tf.where(self.skipped_steps.value > 0, d, np.inf) for d in precondition(self, gradients)]

    for overflows in (False, True):
        if overflows:
            monkeypatch.setattr(method, "precondition", overflowing)
        optimizer = method(every=3)
        variables, step = stepper(optimizer, [(4, 3), (3,)])
        if overflows:
            assert step(good[0])["skipped_steps"] == 1 and int(optimizer.iterations) == 0
        reports = [step(g) for g in good]
        assert all(r["skipped_steps"] == r["failed_refreshes"] == 0 for r in reports)
        seen.append(np.concatenate([v.numpy().ravel() for v in variables]))
    np.testing.assert_array_equal(*seen)
    assert np.abs(seen[0] - 1).min() > 1e-5


def test_the_bad_are_told():
    wrong = {"beta_1": 1.0, "beta_2": -0.1, "epsilon": 0, "every": 0, "max_dimension": 1.5, "merge": 0,
             "factors": "muon", "sign": None, "sides": "left", "block_size": 0}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`SOAP`: `{name}`"):
            SOAP(**{name: value})
    with pytest.raises(ValueError, match="`SOAP`: `block_size` must be None with `sign=True`"):
        SOAP(block_size=128, sign=True)
