"""SOAP against its authors' code, step by step."""

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


def test_merged_axes_are_the_reshaped_tensor():
    start, gradients = random_gradients([(2, 3, 4, 6)])  # 24 by 6, of rank 6: the bases differ where it says nothing
    merged = trajectory(SOAP(every=2, merge=24), start, gradients, [(2, 3, 4, 6)])
    np.testing.assert_allclose(merged, trajectory(SOAP(every=2), start, gradients, [(24, 6)]), rtol=1e-12)


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
    wrong = {"beta_1": 1.0, "beta_2": -0.1, "epsilon": 0, "every": 0, "max_dimension": 1.5, "merge": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`SOAP`: `{name}`"):
            SOAP(**{name: value})
