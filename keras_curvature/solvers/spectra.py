"""A spectral density as stochastic Lanczos quadrature finds it: nodes and weights, and what can be read off them."""

import dataclasses
import math

import numpy as np

from keras_curvature.component import check, check_count, check_number

# The axis is about linear up to this share of the largest |eigenvalue|, and logarithmic beyond.
LINEAR = 1e-3


@dataclasses.dataclass(frozen=True)
class Density:
    """The spectral density of a matrix, `phi(l) = 1/n sum_i delta(l - l_i)`, as nodes and weights.

        phi(l)  ~  1/p sum_j sum_k weights[j, k] delta(l - nodes[j, k])

    One row for each of the `p` random vectors; its weights add up to 1. Nothing is smoothed: a kernel is chosen when it
    is drawn.

    Attributes:
        nodes: `(probes, steps)`, float64.
        weights: `(probes, steps)`, float64.
        size: `n`, the number of eigenvalues.
        products: How many products it took.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    products: int = 0

    def mass(self, low=-math.inf, high=math.inf):
        """The share of the eigenvalues in `[low, high]`, a number in `[0, 1]`."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        return float((self.weights * inside).sum() / len(self.nodes))

    def count(self, low=-math.inf, high=math.inf):
        """How many eigenvalues there are in `[low, high]`, about: `n` times `mass`."""
        return self.size * self.mass(low, high)

    def quantile(self, q):
        """The eigenvalue that a share `q` of all lies below, a float; of an array of shares, an array."""
        q = np.asarray(q, np.float64)
        check(Density.quantile, "q", q.tolist(), bool(np.all((q >= 0) & (q <= 1))), "in [0, 1]")
        nodes, below = self._cumulated()
        # rounding must not push the last quantile past the end, nor a node of no weight in
        at = np.searchsorted(below, q * below[-1] * (1 - 1e-14), side="left")
        found = nodes[np.minimum(at, len(nodes) - 1)]
        return float(found) if q.ndim == 0 else found

    def moment(self, order=1):
        """The mean of `l^order` over the eigenvalues, `tr(A^order) / n`, a float."""
        return float((self.weights * self.nodes**order).sum() / len(self.nodes))

    @property
    def negative(self):
        """The share of the negative eigenvalues in `sum |l_i|`, a number in `[0, 1]`."""
        absolute = self.weights * np.abs(self.nodes)
        total = absolute.sum()
        return float(absolute[self.nodes < 0].sum() / total) if total else 0.0

    @property
    def effective_rank(self):
        """`tr(A)^2 / |A|_F^2`: how many eigenvalues there would be if all of them were alike and the rest 0."""
        second = self.moment(2)
        return self.size * self.moment(1) ** 2 / second if second else 0.0

    @property
    def linear(self):
        """Up to where the symmetric-logarithmic axis is linear: 1e-3 of the largest `|l|`."""
        return LINEAR * float(np.abs(self.nodes).max()) or 1.0

    def scale(self, values):
        """Where eigenvalues stand on the symmetric-logarithmic axis, in decades: `asinh(l / linear) / ln 10`."""
        return np.arcsinh(np.asarray(values, np.float64) / self.linear) / math.log(10)

    def unscale(self, positions):
        """The inverse of `scale`."""
        return self.linear * np.sinh(np.asarray(positions, np.float64) * math.log(10))

    def axis(self, points=400, margin=0.3):
        """Eigenvalues evenly spaced on the symmetric-logarithmic axis, from end to end and `margin` decades more."""
        check_count(Density.axis, "points", points, low=2)
        ends = self.scale([self.nodes.min(), self.nodes.max()])
        return self.unscale(np.linspace(ends[0] - margin, ends[1] + margin, points))

    def smooth(self, axis, width=0.08):
        """The density at the eigenvalues `axis`, per decade of the symmetric-logarithmic axis.

        Each node is a Gaussian of the same width on that axis (not on the eigenvalues', where ten outliers at 100 would
        hide a bulk of width 1), so the integral over `scale(axis)` is 1.

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
        """The nodes of all probes in order, and the mass up to and with each."""
        order = np.argsort(self.nodes, axis=None, kind="stable")
        return self.nodes.ravel()[order], np.cumsum(self.weights.ravel()[order])
