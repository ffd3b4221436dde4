"""Shampoo against the code of Shi et al., step by step."""

import pathlib

import numpy as np
import pytest
from test_soap import trajectory

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


@pytest.mark.parametrize("run", RUNS)
def test_trajectory_is_that_of_the_reference(run):
    start = REFERENCE["plain_start"]
    seen = trajectory(Shampoo(**{**PLAIN, **RUNS[run]}), start, REFERENCE["plain_gradients"], SHAPES)
    assert_close(seen, REFERENCE[f"plain_{run}"], start)


@pytest.mark.parametrize(("run", "part", "shape"), [("first", slice(0, 36), (4, 9)), ("second", slice(36, 54), (6, 3))])
def test_one_sided_trajectory_is_that_of_the_reference_without_the_long_axis(run, part, shape):
    start, gradients = REFERENCE["large_start"][part], REFERENCE["large_gradients"][:, part]
    seen = trajectory(Shampoo(**PLAIN, max_dimension=5), start, gradients, [shape])
    assert_close(seen, REFERENCE[f"large_{run}"], start)
