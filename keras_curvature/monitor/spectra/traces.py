"""Sums over the spectrum from random vectors: trace, diagonal, Frobenius norm, each with its standard error.

Reference: Hutchinson (1990); Bekas, Kokiopoulou and Saad (2007); Epperly, Tropp and Webber, "XTrace: making the most of
every sample in stochastic trace estimation" (2024).
"""

import numpy as np

from keras_curvature.component import check, check_count
from keras_curvature.monitor.spectra import exact
from keras_curvature.monitor.spectra.estimate import Estimate
from keras_curvature.monitor.spectra.xtrace import xtrace
from keras_curvature.solvers import flat
from keras_curvature.solvers.lanczos import MEMORY_LIMIT

# Fewest products for which XTrace is better than Hutchinson's estimate.
XTRACE_FROM = 12


def trace(operator, like, products=30, seed=0, pairs=None, parts=None):
    """The trace by the method that suits it, `(Estimate, {name: Estimate})`.

    Exact, from as many products as there are weights, where these are no more than `products`. Else `deflated` where
    eigenpairs are known, `hutchinson` for `parts` or fewer than 12 products, and `xtrace` otherwise.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: Number of products, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        pairs: `Eigenpairs` that are known. Optional.
        parts: `{name: [indices of tensors in the vector]}`, for the traces of these diagonal blocks. Optional.

    Example: `whole, layers = trace(curvature, gradient, parts={"dense": [0, 1]})`
    """
    check_count(trace, "products", products, low=2)
    _check_parts(trace, parts, len(like))
    if flat.Layout(like).size <= products:
        return exact.trace(operator, like, parts)
    if pairs is not None:
        found = deflated(operator, like, pairs, products, seed, parts=parts or {})
    elif parts is not None or products < XTRACE_FROM:
        found = hutchinson(operator, like, products, seed, parts=parts or {})
    else:
        found = xtrace(operator, like, products, seed), {}
    return found


def hutchinson(operator, like, products=30, seed=0, parts=None):
    """The trace as the mean of `z'Az` over vectors `z` of random signs, an `Estimate`.

    The variance of one product is `2 (|A|_F^2 - sum a_ii^2)`; that of a part `b` is
    `2 sum_{i != j in b} a_ij^2 + sum_{i in b, j not in b} a_ij^2`.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: Number of random vectors, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        parts: `{name: [indices of tensors in the vector]}`, for the traces of these diagonal blocks from the same
            products. Optional.

    Returns:
        The `Estimate`; with `parts`, `(Estimate, {name: Estimate})`.

    Example: `whole, layers = hutchinson(curvature, gradient, parts={"dense": [0, 1]})`
    """
    return _trace(hutchinson, operator, like, products, seed, parts, [], [])


def deflated(operator, like, pairs, products=30, seed=0, parts=None):
    """The trace from known eigenpairs and Hutchinson's estimate of the rest, an `Estimate`.

        tr A = tr D + tr(A - D),     D = sum_i theta_i u_i u_i'

    The first trace is known and the second estimated. The sum is unbiased for any vectors `u_i`. With eigenvectors,
    only the remaining matrix contributes variance; the largest eigenvalues usually make up most of it.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        pairs: `Eigenpairs` from `eigenpairs`.
        products: Number of random vectors, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        parts: As in `hutchinson`.

    Returns:
        The `Estimate`; with `parts`, `(Estimate, {name: Estimate})`. `products` counts only the random vectors.

    Example: `deflated(curvature, gradient, eigenpairs(curvature, gradient, 10))`
    """
    return _trace(deflated, operator, like, products, seed, parts, pairs.values, pairs.vectors)


def _trace(asked_by, operator, like, products, seed, parts, values, vectors):
    check_count(asked_by, "products", products, low=2)
    _check_parts(asked_by, parts, len(like))
    layout = flat.Layout(like)
    flat.check_memory(len(vectors), layout, MEMORY_LIMIT, "pass fewer pairs")
    known = [(float(value), layout.pack(vector)) for value, vector in zip(values, vectors)]
    samples = np.array([_by_tensor(operator, layout, layout.signs(seed, "trace", i), known) for i in range(products)])
    samples += sum(value * layout.dots(u, u) for value, u in known)
    whole = _estimate(samples.sum(1), products)
    if parts is None:
        return whole
    return whole, {name: _estimate(samples[:, list(indices)].sum(1), products) for name, indices in parts.items()}


def _by_tensor(operator, layout, z, known):
    """`z'(A - D)z`, split by the tensors of the first `z`."""
    found = layout.dots(z, layout.product(operator, z))
    for value, u in known:
        along = layout.dots(z, u)
        found -= value * along.sum() * along
    return found


def diagonal(operator, like, products=100, seed=0):
    """The diagonal as the mean of `z * Az` over vectors `z` of random signs, with its standard errors.

    The standard error of entry `i` is about `sqrt(sum_{j != i} a_ij^2 / products)`. For a network, 100 products do not
    determine the sign of small entries.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: Number of products, at least 2. Defaults to `100`.
        seed: Of the random vectors, an integer. Defaults to `0`.

    Returns:
        `(vector, vector of standard errors)`.

    Example: `entries, stderr = diagonal(curvature, gradient)`
    """
    check_count(diagonal, "products", products, low=2)
    layout = flat.Layout(like)
    mean, squares = np.zeros(layout.size, layout.dtype), np.zeros(layout.size, layout.dtype)
    for i in range(products):
        z = layout.signs(seed, "trace", i)
        sample = z * layout.product(operator, z)
        change = sample - mean
        mean += change / (i + 1)
        squares += change * (sample - mean)  # Welford's update
    stderr = np.sqrt(squares / (products * (products - 1)))
    return layout.unpack(mean), layout.unpack(stderr)


def squared_frobenius(operator, like, products=30, seed=0):
    """`|A|_F^2`, the sum of the squared eigenvalues, as the mean of `|Az|^2` over random signs, an `Estimate`.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: Number of products, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.

    Example: `squared_frobenius(curvature, gradient).value ** 0.5`
    """
    check_count(squared_frobenius, "products", products, low=2)
    layout = flat.Layout(like)
    images = (layout.product(operator, layout.signs(seed, "trace", i)) for i in range(products))
    return _estimate(np.array([flat.dot(image, image) for image in images]), products)


def _estimate(samples, products):
    """The mean of the samples, with its standard error."""
    return Estimate(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples))), products)


def _check_parts(asked_by, parts, count):
    valid = parts is None or (
        isinstance(parts, dict) and all(0 <= i < count for indices in parts.values() for i in indices)
    )
    check(asked_by, "parts", parts, valid, f"a dict of names to lists of indices in [0, {count})")
