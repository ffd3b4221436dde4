"""The protocol of Table 1 of the CurveBall paper (arXiv 1805.08095), as in its code.

100 runs of at most 5000 iterations (Rosenbrock) or 1000 (Rahimi-Recht), each from its own start. The result of a run is
the 1-based index of the first iteration with a loss below 1e-4. The loss is computed before the iteration's update and
with its noise. Runs that never reach 1e-4 are left out of the mean. CurveBall's numbers in the table need a step size
of 0.5 and a fixed damping of 0.1 on Rosenbrock, and 1 and 1 on Rahimi-Recht.
"""

from collections.abc import Sequence

import numpy as np


def table_1_starts(n: int = 100, seed: int = 0) -> np.ndarray:
    """The starting points of the Rosenbrock columns, float64, `(n, 2)`.

    A point is `[-1/4, -1/4] + (U[0, 1) - 1/2) / 2` with one draw for both coordinates, so the points are on the
    diagonal, with coordinates in [-1/2, 0).

    Args:
        n: Number of points. Defaults to `100`.
        seed: Seed of the points. Defaults to `0`.

    Raises:
        ValueError: `n` is less than 1.

    Example: `for start in problems.table_1_starts(): ...`
    """
    if n < 1:
        raise ValueError(f"`table_1_starts`: `n` must be at least 1. Received: n={n}")
    shift = 0.5 * (np.random.RandomState(seed).rand(n, 1) - 0.5)  # (n, 1)
    return np.array([-0.25, -0.25]) + shift  # (n, 2)


def rosenbrock_start(seed: int = 0) -> np.ndarray:
    """The starting point of `problems.get("rosenbrock").model(seed)`, float64, `(2,)`."""
    return table_1_starts(1, seed)[0]


def first_below(losses: Sequence[float], tolerance: float = 1e-4) -> int | None:
    """The 1-based index of the first loss below `tolerance`; `None` if there is none.

    Args:
        losses: The losses of a run, in order.
        tolerance: The level to reach. Defaults to `1e-4` (the paper).

    Example:

    >>> first_below([1.0, 1e-3, 1e-5])
    3
    """
    below = np.flatnonzero(np.asarray(losses) < tolerance)
    return int(below[0]) + 1 if below.size else None
