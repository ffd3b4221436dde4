"""Several Lanczos runs, each in the orthogonal complement of the eigenpairs found so far.

One run finds one copy of a multiple eigenvalue, because its Krylov space has one vector of each eigenspace. In the
complement of the vectors found, a random start has parts along the other copies. A Ritz value of a run in the
complement, the operator's `P A P`, that is larger than the `k`-th value found shows that an eigenvalue is missing.

The last run only has to show that nothing is missing. It ends, after `CHECK` products at least, when its largest Ritz
value plus its residual is no larger than the `k`-th value. No bound excludes a larger eigenvalue along which the random
start is almost zero; the same holds for every Lanczos run.
"""

import numpy as np

from keras_curvature.solvers import flat
from keras_curvature.solvers.krylov import Eigenpairs, Process, goal

# So many products from a random start find the largest eigenvalue of a network to about 1e-4; see `lanczos.extremes`.
CHECK = 10


class Found:
    """The best `k` eigenpairs of the runs so far, in flat arrays.

    A place without a pair has a vector of zeros and the value `-inf`, or `inf` where the smallest are wanted.

    Args:
        operator, like, k, metric, tolerance, most_negative: As in `lanczos.eigenpairs`.
        room: Number of vectors that a basis has room for beside `k`.

    Attributes:
        products: Number of products so far.
    """

    def __init__(self, operator, like, k, room, metric, tolerance, most_negative):
        self._operator, self._like, self._metric, self._layout = operator, like, metric, flat.Layout(like)
        self._k, self._rows, self._tolerance, self._most_negative = k, k + room, tolerance, most_negative
        self._values = np.full(k, np.inf if most_negative else -np.inf)
        self._vectors = np.zeros((k, self._layout.size), self._layout.dtype)
        self._residuals, self._converged = np.zeros(k), np.zeros(k, bool)
        self._size, self._runs, self._exhausted = 0.0, 0, True
        self.products = 0

    def run(self, seed, start, most):
        """The first run, from `start` or a random vector."""
        process = self._process()
        process.begin(process.first(start, seed))
        ritz = self._search(process, most, lambda ritz: len(ritz.values) == self._k and ritz.converged.all())
        self._take(process, ritz)

    def run_in_complement(self, seed, most):
        """Another run, until `most` products of all runs; whether it found a pair."""
        known = np.isfinite(self._values)
        if known.sum() == self._layout.size:
            return False
        U = self._vectors[known]
        MU = U if self._metric is None else np.stack([self._layout.product(self._metric, u) for u in U])
        process = self._process(flat.Complement(U, MU))
        process.begin(process.project(self._layout.normal(seed, "start", self._runs)))

        def done(ritz):
            larger = self._larger(ritz.values)
            if larger.any():
                return ritz.converged[larger].all()
            reach = ritz.values[0] + (-ritz.residuals[0] if self._most_negative else ritz.residuals[0])
            shown = ritz.converged[0] or not self._larger(np.array([reach]))[0]
            return process.products >= CHECK and shown

        ritz = self._search(process, most - self.products, done)
        better = ritz.first(int(self._larger(ritz.values).sum()))
        self._take(process, better)
        return len(better.values) > 0

    def eigenpairs(self):
        """The pairs, `Eigenpairs`."""
        order = [i for i in self._order() if np.isfinite(self._values[i])]
        vectors = [self._layout.unpack(self._vectors[i]) for i in order]
        found = (self._values[order], vectors, self._residuals[order])
        return Eigenpairs(*found, self.products, self._converged[order], self._exhausted)

    def _process(self, rest=None):
        free = self._layout.size - (0 if rest is None else rest.count)
        return Process(self._operator, self._like, min(self._rows, free), self._metric, rest, self._size)

    def _search(self, process, most, done):
        ritz = process.search(self._k, most, self._tolerance, self._most_negative, done)
        self.products += process.products
        self._size, self._runs = max(self._size, ritz.size), self._runs + 1
        self._exhausted = self._exhausted and process.exhausted
        return ritz

    def _order(self):
        """The places, that of the best pair first."""
        return np.argsort(self._values if self._most_negative else -self._values, kind="stable")

    def _larger(self, values):
        """Whether each of some sorted values has a place among the best `k`, by more than the accuracy of the others.

        The first would replace the `k`-th, the second then the one before it, and so on.
        """
        places = self._order()[::-1][: len(values)]
        worst, free = self._values[places], ~np.isfinite(self._values[places])
        error = np.maximum(goal(np.where(free, 0, worst), self._size, self._tolerance), self._residuals[places])
        above = worst - values if self._most_negative else values - worst
        return free | (above > error)

    def _take(self, process, ritz):
        places = self._order()[::-1][: len(ritz.values)]
        for place, vector in zip(places, process.vectors(ritz)):
            self._vectors[place] = vector
        self._values[places], self._residuals[places] = ritz.values, ritz.residuals
        self._converged[places] = ritz.converged
