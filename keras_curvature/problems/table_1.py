"""The protocol of Table 1 of the CurveBall paper (arXiv 1805.08095), from the code behind it.

100 runs of at most 5000 iterations (Rosenbrock) or 1000 (Rahimi-Recht), each from its own start. The number of a run is
the 1-based index of the first iteration with a loss below 1e-4. The loss is taken before the iteration's update and
with its noise. Runs that never reach 1e-4 are left out of the mean. CurveBall's numbers in the table need a step size
of 0.5 and a fixed damping of 0.1 on Rosenbrock, 1 and 1 on Rahimi-Recht.
"""

import numpy as np


def table_1_starts(n=100, seed=0):
    """The `n` starting points of the Rosenbrock columns, float64, (n, 2).

    `[-1/4, -1/4] + (U[0, 1) - 1/2) / 2`, one draw for both coordinates: the starts lie on the diagonal, in
    [-1/2, 0).
    """
    if n < 1:
        raise ValueError(f"n must be a positive number of starts. Received: n={n}")
    shift = 0.5 * (np.random.RandomState(seed).rand(n, 1) - 0.5)  # (n, 1)
    return np.array([-0.25, -0.25]) + shift  # (n, 2)


def rosenbrock_start(seed=0):
    """One starting point, (2,): where `problems.get("rosenbrock").model(seed)` begins."""
    return table_1_starts(1, seed)[0]


def first_below(losses, tolerance=1e-4):
    """The 1-based index of the first of `losses` below `tolerance`, or None where none is."""
    below = np.flatnonzero(np.asarray(losses) < tolerance)
    return int(below[0]) + 1 if below.size else None
