"""KL-Shampoo against its authors' code, step by step, and what its factors converge to."""

import pathlib

import numpy as np
import pytest
from test_soap import trajectory

from keras_curvature.optimizers.kl_shampoo import KLShampoo

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "klshampoo_trajectories.npz")
RUNS = {
    "plain_every1": {"every": 1},
    "plain_every2": {"every": 2},
    "plain_every10": {"every": 10},
    "clamped_every2": {"every": 2, "beta_1": 0.8, "beta_2": 0.5, "initial": 0.02},
}
SHAPES = [(6, 6), (5, 5)]

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("run", RUNS)
def test_trajectory_is_that_of_the_authors_code(run):
    scale = 1e-3 if run.startswith("clamped") else 1.0
    start, gradients = REFERENCE["plain_start"], scale * REFERENCE["plain_gradients"]
    seen = trajectory(KLShampoo(**RUNS[run]), start, gradients, SHAPES)
    moved = np.abs(REFERENCE[run] - start).max()
    np.testing.assert_allclose(seen, REFERENCE[run], rtol=0, atol=1e-10 * moved)
