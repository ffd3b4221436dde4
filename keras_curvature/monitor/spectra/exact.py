"""Exact traces and spectra for small matrices, from a product with each unit vector."""

import numpy as np

from keras_curvature.monitor.spectra.density import Density
from keras_curvature.monitor.spectra.estimate import Estimate
from keras_curvature.solvers import flat
from keras_curvature.solvers.lanczos import MEMORY_LIMIT


def trace(operator, like, parts=None):
    """The trace and the traces of diagonal blocks, `(Estimate, {name: Estimate})`, with standard errors of 0.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes. There are as many products as it has entries.
        parts: `{name: [indices of tensors in the vector]}`. Optional.
    """
    entries, layout = _matrix_diagonal(operator, like), flat.Layout(like)
    by_tensor = layout.dots(entries, np.ones_like(entries))
    parts = {name: _known(by_tensor[list(indices)].sum(), layout.size) for name, indices in (parts or {}).items()}
    return _known(by_tensor.sum(), layout.size), parts


def diagonal(operator, like):
    """The diagonal and its standard errors, which are 0, `(vector, vector)`."""
    layout, entries = flat.Layout(like), _matrix_diagonal(operator, like)
    return layout.unpack(entries.astype(layout.dtype)), layout.unpack(np.zeros(layout.size, layout.dtype))


def density(operator, like):
    """The spectral density, a `Density`, from all eigenvalues."""
    layout = flat.Layout(like)
    flat.check_memory(2 * layout.size, layout, MEMORY_LIMIT, "pass fewer steps")
    matrix = np.array([layout.product(operator, unit) for unit in np.eye(layout.size, dtype=layout.dtype)], np.float64)
    return Density.of_eigenvalues(np.linalg.eigvalsh((matrix + matrix.T) / 2))


def _matrix_diagonal(operator, like):
    """The diagonal, float64 `(n,)`."""
    layout = flat.Layout(like)
    entries, unit = np.zeros(layout.size), np.zeros(layout.size, layout.dtype)
    for i in range(layout.size):
        unit[i] = 1
        entries[i] = layout.product(operator, unit)[i]
        unit[i] = 0
    return entries


def _known(value, products):
    return Estimate(float(value), 0.0, products)
