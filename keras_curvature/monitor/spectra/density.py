"""The density of a spectrum, from a few random vectors, by stochastic Lanczos quadrature."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from keras_curvature.component import check, check_count, check_number
from keras_curvature.monitor.spectra.estimate import Estimate
from keras_curvature.solvers import flat
from keras_curvature.solvers.krylov import Process, Tridiagonal
from keras_curvature.solvers.lanczos import MEMORY_LIMIT

# The axis is about linear up to this share of the largest |eigenvalue|, and logarithmic above.
LINEAR = 1e-3


@dataclasses.dataclass(frozen=True)
class Density:
    """The spectral density of a matrix, `phi(l) = 1/n sum_i delta(l - l_i)`, as nodes and weights.

        phi(l)  ~  1/p sum_j sum_k weights[j, k] delta(l - nodes[j, k])

    There is one row for each of the `p` random vectors, and its weights sum to 1. Nothing is smoothed; `smooth` applies
    a kernel. Known eigenvalues are nodes of every row with the weight `1/n`.

    Attributes:
        nodes: `(vectors, nodes)`, float64.
        weights: `(vectors, nodes)`, float64.
        size: `n`, the number of eigenvalues.
        products: Number of products that it took.
        runs: The Lanczos runs behind it, `Tridiagonal` records, orthogonal to the known eigenvectors.
        known: The known eigenvalues.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    products: int = 0
    runs: tuple[Tridiagonal, ...] = dataclasses.field(default=(), repr=False)
    known: np.ndarray = dataclasses.field(default=(), repr=False)  # type: ignore[arg-type]

    @classmethod
    def of_runs(cls, runs: Sequence[Tridiagonal], size: int, known: Any = ()) -> Self:
        """The `Density` of Lanczos runs from random unit vectors, beside known eigenvalues."""
        known = np.asarray(known, np.float64)
        longest = max(len(run.alpha) for run in runs)
        rest, each = (size - len(known)) / size, np.full(len(known), 1 / size)
        nodes, weights = [], []
        for run in runs:
            theta, shares = run.quadrature()
            missing = longest - len(theta)  # a run that ended early gets nodes of weight 0
            if len(theta):
                theta, shares = np.pad(theta, (0, missing), mode="edge"), np.pad(shares, (0, missing))
            nodes.append(np.concatenate([theta, known]))
            weights.append(np.concatenate([rest * shares, each]))
        products = sum(run.products for run in runs)
        return cls(np.array(nodes), np.array(weights), size, products, tuple(runs), known)

    @classmethod
    def of_eigenvalues(cls, values: Any, products: int | None = None) -> Self:
        """The `Density` where all eigenvalues are known: exact."""
        values = np.sort(np.asarray(values, np.float64))
        products = len(values) if products is None else products
        return cls(values[np.newaxis], np.full((1, len(values)), 1 / len(values)), len(values), products, (), values)

    def mass(self, low: float = -math.inf, high: float = math.inf) -> float:
        """The share of the eigenvalues in `[low, high]`, a number in `[0, 1]`."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        return float((self.weights * inside).sum() / len(self.nodes))

    def count(self, low: float = -math.inf, high: float = math.inf) -> float:
        """About how many eigenvalues are in `[low, high]`: `n` times `mass`."""
        return self.size * self.mass(low, high)

    def quantile(self, q: Any) -> Any:
        """The eigenvalue below which a share `q` of all eigenvalues is, a float; for an array of shares, an array."""
        q = np.asarray(q, np.float64)
        check(Density.quantile, "q", q.tolist(), bool(np.all((q >= 0) & (q <= 1))), "in [0, 1]")
        nodes, below = self._cumulated()
        # rounding must neither push the last quantile past the end nor reach a node of weight 0
        at = np.searchsorted(below, q * below[-1] * (1 - 1e-14), side="left")
        found = nodes[np.minimum(at, len(nodes) - 1)]
        return float(found) if q.ndim == 0 else found

    def moment(self, order: int = 1) -> float:
        """The mean of `l^order` over the eigenvalues, `tr(A^order) / n`, a float."""
        return float((self.weights * self.nodes**order).sum() / len(self.nodes))

    @property
    def negative(self) -> Estimate:
        """The share of the negative eigenvalues in `sum |l_i|`, an `Estimate` in `[0, 1]`.

        Most eigenvalues of a network are near zero, where `|l|` has its kink, and quadratures with an even and an odd
        number of steps lie on both sides of the exact share. So the estimate is the mean over all numbers of steps from
        half of them on. Their spread is part of the standard error, beside the jackknife's over the random vectors.
        """
        below, whole = self._absolute()
        if len(self.known) == self.size:
            return Estimate(float(_ratio(below, whole)[0]), 0.0, self.products)
        shares, rows = _ratio(below, whole), range(below.shape[1])
        left_out = [_ratio(np.delete(below, i, 1), np.delete(whole, i, 1)).mean() for i in rows if len(rows) > 1]
        spread = math.sqrt((len(rows) - 1) * np.var(left_out)) if left_out else math.nan
        return Estimate(float(shares.mean()), math.hypot(spread, np.std(shares)), self.products)

    @property
    def effective_rank(self) -> float:
        """`tr(A)^2 / |A|_F^2`: the rank of a matrix with this trace and norm whose nonzero eigenvalues are equal."""
        second = self.moment(2)
        return self.size * self.moment(1) ** 2 / second if second else 0.0

    @property
    def linear(self) -> float:
        """The eigenvalue up to which the symmetric-logarithmic axis is linear: 1e-3 of the largest `|l|`."""
        return LINEAR * float(np.abs(self.nodes).max()) or 1.0

    def scale(self, values: Any) -> np.ndarray:
        """Positions on the symmetric-logarithmic axis, in decades: `asinh(l / linear) / ln 10`."""
        return np.arcsinh(np.asarray(values, np.float64) / self.linear) / math.log(10)

    def unscale(self, positions: Any) -> np.ndarray:
        """The inverse of `scale`."""
        return self.linear * np.sinh(np.asarray(positions, np.float64) * math.log(10))

    def axis(self, points: int = 400, margin: float = 0.3) -> np.ndarray:
        """Eigenvalues evenly spaced on the symmetric-logarithmic axis, `margin` decades beyond both ends."""
        check_count(Density.axis, "points", points, low=2)
        ends = self.scale([self.nodes.min(), self.nodes.max()])
        return self.unscale(np.linspace(ends[0] - margin, ends[1] + margin, points))

    def smooth(self, axis: Any, width: float = 0.08) -> np.ndarray:
        """The density at the eigenvalues `axis`, per decade of the symmetric-logarithmic axis.

        Each node becomes a Gaussian of one width on that axis, so the integral over `scale(axis)` is 1. (On a linear
        axis ten outliers at 100 would hide a bulk of width 1.)

        Args:
            axis: An array of eigenvalues, such as `axis()`.
            width: Standard deviation of the Gaussian, in decades. Defaults to `0.08`.

        Returns:
            An array as long as `axis`.
        """
        check_number(Density.smooth, "width", width, low=0, open_low=True)
        centres, weights = self.scale(self.nodes).ravel(), self.weights.ravel() / len(self.nodes)
        distance = (self.scale(axis)[:, np.newaxis] - centres) / width
        return np.exp(-0.5 * distance**2) @ weights / (width * math.sqrt(2 * math.pi))

    def _cumulated(self):
        """The nodes of all vectors in order, and the mass up to and including each."""
        order = np.argsort(self.nodes, axis=None, kind="stable")
        return self.nodes.ravel()[order], np.cumsum(self.weights.ravel()[order])

    def _absolute(self):
        """The means of `max(-l, 0)` and of `|l|`, each `(numbers of steps, vectors)`."""
        if not self.runs:
            both = [(self.weights * part).sum(1) for part in (np.maximum(-self.nodes, 0), np.abs(self.nodes))]
            return both[0][np.newaxis], both[1][np.newaxis]
        most = max(len(run.alpha) for run in self.runs)
        found = [[_absolute(run, steps) for run in self.runs] for steps in range(max(1, most // 2), max(1, most) + 1)]
        below, whole = np.moveaxis(np.array(found), -1, 0) * (self.size - len(self.known)) / self.size
        return below + np.maximum(-self.known, 0).sum() / self.size, whole + np.abs(self.known).sum() / self.size


def _absolute(run, steps):
    """The quadratures of `max(-l, 0)` and of `|l|` after some steps; of all steps where the run is exact."""
    nodes, weights = run.quadrature(None if run.exhausted else steps)
    return weights @ np.maximum(-nodes, 0), weights @ np.abs(nodes)


def _ratio(below, whole):
    """The ratio of the means over the vectors; 0 for 0 / 0."""
    parts = below.mean(1), whole.mean(1)
    return np.divide(*parts, out=np.zeros(len(below)), where=parts[1] > 0)


def density(operator, like, vectors=4, steps=60, seed=0, pairs=None, memory_limit=MEMORY_LIMIT):
    """The spectral density, a `Density`, by stochastic Lanczos quadrature, in the memory of three vectors.

    For each random unit vector the nodes are the eigenvalues of `T` and the weights are the squared first entries of
    its eigenvectors. With many weights the Wasserstein distance to the true density is at most `12 / steps` of its
    range from one random vector, with high probability; several vectors reduce the noise in the weights of outliers.

    Known eigenpairs get the weight `1/n` each. The random vectors are then orthogonal to them, so the steps only have
    to resolve the rest of the spectrum.

    Reference: Chen, Trogdon and Ubaru, "Analysis of stochastic Lanczos quadrature for spectrum approximation" (2021).

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        vectors: Number of random vectors. Defaults to `4`.
        steps: Number of products for each, at most the number of eigenvalues. Defaults to `60`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        pairs: Known `Eigenpairs`, from either end or both. Optional.
        memory_limit: Most bytes for the vectors of `pairs`. Defaults to `8e9`.

    Raises:
        ValueError: A product is not finite, or the vectors of `pairs` need more than `memory_limit`.

    Example: `density(curvature, gradient).quantile([0.1, 0.5, 0.9])`
    """
    check_count(density, "vectors", vectors)
    check_count(density, "steps", steps)
    values, layout = np.zeros(0) if pairs is None else np.asarray(pairs.values, np.float64), flat.Layout(like)
    flat.check_memory(len(values), layout, memory_limit, "pass fewer pairs")
    if len(values) >= layout.size:
        return Density.of_eigenvalues(values, products=0)
    rest = flat.Complement(np.stack([layout.pack(u) for u in pairs.vectors])) if len(values) else None
    size = np.abs(values).max(initial=0.0)
    runs = []
    for number in range(vectors):
        process = Process(operator, like, 0, None, rest, size)
        process.begin(process.project(layout.normal(seed, "density", number)))
        alpha, beta = process.run_without_basis(min(steps, layout.size - len(values)))
        runs.append(Tridiagonal(alpha, beta, None, process.products, process.exhausted))
    return Density.of_runs(runs, layout.size, values)
