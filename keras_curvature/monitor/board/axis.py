"""The axis of the histograms of eigenvalues."""

import dataclasses
import math

import numpy as np

# Bins of a histogram, a few more than TensorBoard draws; and the standard deviation, in decades, with which each
# eigenvalue is drawn, since Lanczos gives few nodes.
BINS, WIDTH = 60, 0.15


@dataclasses.dataclass(frozen=True)
class Axis:
    """A symmetric logarithmic axis, `x = sign(l) log10(1 + |l| / unit)`, which shows both bulk and outliers.

    Args:
        unit: The size that counts as near 0.
        ends: The smallest and the largest `x`.
    """

    unit: float
    ends: tuple

    @classmethod
    def of(cls, density):
        """An axis for a density and later ones, whose ends may be about ten times as far out."""
        far = float(np.max(np.abs(density.nodes))) or 1.0
        unit = 10.0 ** (math.floor(math.log10(far)) - 3)
        axis = cls(unit, (0.0, 0.0))
        right = math.ceil(axis.place(far)) + 1.0
        left = math.floor(axis.place(float(np.min(density.nodes))))
        return cls(unit, (min(left, -1.0), right))

    def place(self, value):
        """Positions of eigenvalues on the axis."""
        return np.sign(value) * np.log10(1.0 + np.abs(value) / self.unit)

    def bars(self, density, size):
        """Left, right, and log10(1 + number of eigenvalues) in bins of equal width, of `size` eigenvalues in all.

        Each eigenvalue becomes a Gaussian on this axis. The outermost bins also count those beyond the ends.
        """
        edges = np.linspace(*self.ends, BINS + 1)
        nodes, weights = self.place(density.nodes).ravel(), density.weights.ravel() / density.weights.sum()
        nodes = np.clip(nodes, *self.ends)
        below = np.vectorize(math.erf)((edges[:, None] - nodes) / (WIDTH * math.sqrt(2))) / 2 + 0.5  # (edges, nodes)
        below[0], below[-1] = 0.0, 1.0
        counted = np.diff(below, axis=0) @ weights * size
        return np.stack([edges[:-1], edges[1:], np.log10(1.0 + counted)], axis=1)

    def title(self):
        """The axis in one line."""
        return f"eigenvalues; on this axis 3 is {1e3 * self.unit:.3g}, 4 is {1e4 * self.unit:.3g}"

    def words(self):
        """The axis in Markdown."""
        marks = ", ".join(f"{n} is {self.unit * (10.0**n - 1):.3g}" for n in (1, 2, 3, 4))
        return (
            f"Spectral density of the curvature, one layer for each time. The axis is x = sign(l) log10(1 + |l| / "
            f"{self.unit:.3g}): {marks}; likewise below 0. Heights are log10(1 + number of eigenvalues)."
        )
