"""KL-Shampoo against its authors' code, step by step, and against its equations with dense matrices."""

import functools
import pathlib

import keras
import numpy as np
import pytest
from selection import some
from test_soap import random_gradients, stepper, trajectory

from keras_curvature.optimizers.kl_shampoo import KLShampoo

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "klshampoo_trajectories.npz")
RUNS = {
    **{f"plain_every{n}": {"every": n, "initial": 0.1} for n in (1, 2, 10)},
    "clamped_every2": {"every": 2, "beta_1": 0.8, "beta_2": 0.5, "initial": 0.02},
}
SHAPES = [(6, 6), (5, 5)]

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("run", some(RUNS, ["plain_every2", "clamped_every2"]))
def test_trajectory_is_that_of_the_authors_code(run):
    scale = 1e-3 if run.startswith("clamped") else 1.0
    start, gradients = REFERENCE["plain_start"], scale * REFERENCE["plain_gradients"]
    seen = trajectory(KLShampoo(1e-3, **RUNS[run]), start, gradients, SHAPES)
    moved = np.abs(REFERENCE[run] - start).max()
    np.testing.assert_allclose(seen, REFERENCE[run], rtol=0, atol=1e-10 * moved)


def test_three_axes_follow_the_equations_with_dense_kronecker_products():
    shape, b1, b2 = (2, 3, 4), 0.8, 0.9
    start, gradients = random_gradients([shape])
    seen = trajectory(KLShampoo(1.0, b1, b2, 1e-3, every=1, initial=0.1, merge=1), start, gradients, [shape])
    kron = functools.partial(functools.reduce, np.kron)
    w, m = start, np.zeros_like(start)
    S, values, Q = [np.zeros((n, n)) for n in shape], [np.full(n, 0.1) for n in shape], [np.eye(n) for n in shape]
    for t, (row, weights) in enumerate(zip(gradients, seen)):
        inverses = [q / v @ q.T if t else q for q, v in zip(Q, values)]
        if t:
            m = b1 * m + (1 - b1) * row
            basis = kron(Q)
            w = w - basis @ (basis.T @ m / (np.sqrt(kron(values)) + 1e-3))
        for k, n in enumerate(shape):
            unfolded = np.moveaxis(row.reshape(shape), k, 0).reshape(n, -1)
            others = kron([inverses[j] for j in range(3) if j != k])
            new = unfolded @ others @ unfolded.T * n / row.size
            S[k] = b2 * S[k] + (1 - b2) * new
            if t:
                values[k] = np.maximum(b2 * values[k] + (1 - b2) * np.diag(Q[k].T @ new @ Q[k]), 1e-2)
        Q = [np.linalg.qr(s @ q)[0] if t else np.linalg.eigh(s)[1][:, ::-1] for s, q in zip(S, Q)]
        np.testing.assert_allclose(weights, w, rtol=1e-9, atol=1e-9, err_msg=f"step {t}")


def test_a_long_axis_has_no_factor_and_vectors_are_adams():
    optimizer = KLShampoo(max_dimension=5)
    optimizer.build([keras.Variable(np.ones(shape)) for shape in [(4, 9), (9,), (2, 2)]])
    assert [tuple(f.shape) for f in optimizer._factors] == [(4, 4), (2, 2), (2, 2)]
    start, gradients = random_gradients([(5,), ()])
    seen = trajectory(KLShampoo(1e-2, beta_1=0.8, beta_2=0.9), start, gradients, [(5,), ()])
    adam = keras.optimizers.Adam(1e-2, beta_1=0.8, beta_2=0.9, epsilon=1e-8)
    np.testing.assert_allclose(seen[1:], trajectory(adam, start, gradients[1:], [(5,), ()]), atol=1e-7)


@pytest.mark.slow
def test_xla_takes_the_same_steps():
    start, gradients = REFERENCE["plain_start"], REFERENCE["plain_gradients"][:6]
    compiled, graph = (
        trajectory(KLShampoo(every=2), start, gradients, SHAPES, jit, "float32") for jit in (True, False)
    )
    np.testing.assert_allclose(compiled, graph, atol=2e-5)


def test_a_factor_that_is_not_finite_leaves_the_last_basis_and_is_reported():
    optimizer, random = KLShampoo(every=2), np.random.default_rng(0)
    variables, step = stepper(optimizer, [(4, 3)])
    for _ in range(3):
        assert step([random.standard_normal((4, 3))])["failed_refreshes"] == 0
    before = [b.numpy() for b in optimizer._bases]
    optimizer._factors[1].assign(np.full((3, 3), np.nan))
    seen = [step([random.standard_normal((4, 3))]) for _ in range(2)]
    assert [s["failed_refreshes"] for s in seen] == [0, 1]
    assert [np.array_equal(old, new.numpy()) for old, new in zip(before, optimizer._bases)] == [False, True]
    assert all(np.isfinite(v.numpy()).all() for v in variables)


@pytest.mark.parametrize("scale", some([1e-25, 1e-10, 1e10, 1e15], [1e-25, 1e15]))
def test_singular_factors_of_any_size_do_no_harm(scale):
    variables, step = stepper(KLShampoo(every=1), [(6, 5)])
    random = np.random.default_rng(0)
    column = random.standard_normal((6, 1))
    for _ in range(5):
        seen = step([scale * column @ random.standard_normal((1, 5))])  # of rank one
        assert seen["skipped_steps"] == seen["failed_refreshes"] == 0
    assert np.isfinite(variables[0].numpy()).all()


def test_the_bad_are_told():
    wrong = {"beta_1": 1.0, "beta_2": -0.1, "epsilon": 0, "every": 0, "initial": 0.0, "max_dimension": 1.5, "merge": 0,
             "block_size": 0.5}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`KLShampoo`: `{name}`"):
            KLShampoo(**{name: value})
