"""SOAP against its authors' code, step by step."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

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


@pytest.mark.parametrize("run", RUNS)
def test_trajectory_is_that_of_the_authors_code(run):
    problem = run.split("_")[0]
    start, gradients = REFERENCE[f"{problem}_start"], REFERENCE[f"{problem}_gradients"]
    seen = trajectory(SOAP(**RUNS[run]), start, gradients, SHAPES[problem])
    moved = np.abs(REFERENCE[run] - start).max()
    assert moved > 1e-2
    np.testing.assert_allclose(seen, REFERENCE[run], rtol=0, atol=1e-11 * moved)
