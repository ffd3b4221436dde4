"""Sums over the spectrum by random vectors: trace, diagonal, Frobenius norm, each with its standard error.

Reference: Hutchinson (1990); Bekas, Kokiopoulou and Saad (2007); Epperly, Tropp and Webber, "XTrace: making the most of
every sample in stochastic trace estimation" (2024).
"""

import numpy as np

from keras_curvature.component import check, check_count
from keras_curvature.monitor.spectra.estimate import Estimate
from keras_curvature.solvers import flat
from keras_curvature.solvers.lanczos import MEMORY_LIMIT

# A vector lies in a basis where no more than so many roundings of its length are left outside.
DEPENDENT = 10


def hutchinson(operator, like, products=30, seed=0, parts=None):
    """The trace as the mean of `z'Az` over vectors `z` of random signs, an `Estimate`.

    One product has the variance `2 (|A|_F^2 - sum a_ii^2)`; of a part `b`,
    `2 sum_{i != j in b} a_ij^2 + sum_{i in b, j not in b} a_ij^2`.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: How many vectors, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        parts: `{name: [indices of tensors in the vector]}`, for the traces of these diagonal blocks from the same
            products. Optional.

    Returns:
        The `Estimate`; with `parts`, `(Estimate, {name: Estimate})`.

    Example: `whole, layers = hutchinson(curvature, gradient, parts={"dense": [0, 1]})`
    """
    return _trace(hutchinson, operator, like, products, seed, parts, [], [])


def deflated(operator, like, pairs, products=30, seed=0, parts=None):
    """The trace where some eigenpairs are known: their values and Hutchinson's estimate of the rest, an `Estimate`.

        tr A = tr D + tr(A - D),     D = sum_i theta_i u_i u_i'

    The first trace is known and the second estimated. It is unbiased whatever the vectors are; with eigenvectors the
    variance is that of what is left, and the largest eigenvalues make most of it.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        pairs: `Eigenpairs`, of `eigenpairs`.
        products: How many random vectors, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        parts: As in `hutchinson`.

    Returns:
        The `Estimate`; with `parts`, `(Estimate, {name: Estimate})`. `products` counts the random vectors alone.

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
    """`z'(A - D)z`, by the tensors of the first `z`."""
    found = layout.dots(z, layout.product(operator, z))
    for value, u in known:
        along = layout.dots(z, u)
        found -= value * along.sum() * along
    return found


def xtrace(operator, like, products=30, seed=0, memory_limit=MEMORY_LIMIT):
    """The trace by the XTrace estimator, an `Estimate`: for spectra that fall off, much closer than Hutchinson's.

    Half of the products go to random vectors `w_i`; with `Q_i` an orthonormal basis of the others' products,

        tr_i = tr(Q_i'A Q_i) + (n - rank Q_i) m'Am / |m|^2,     m = w_i - Q_i Q_i' w_i

    is unbiased for each `i`, and the mean over them is returned. All come of one basis and the other half of the
    products. Of an operator of low rank, products that lie in the space of the others are left out of the basis. For
    fewer than about 12 products, use `hutchinson`.

    Difference from the paper: (1) the standard error is not that of independent `tr_i`, which is too small (errors are
    1.1 to 2.5 times that on the average), but the jackknife's, which is too large (errors are 0.4 to 1 times that).

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: How many, at least 4; of an odd number one is not used, nor are more than `2 n`. Half as many vectors
            are held. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        memory_limit: Most bytes for the vectors. Defaults to `8e9`.

    Raises:
        ValueError: The vectors would take more than `memory_limit`.

    Example: `xtrace(curvature, gradient, products=30)`
    """
    check_count(xtrace, "products", products, low=4)
    layout = flat.Layout(like)
    k = min(products // 2, layout.size)
    flat.check_memory(k, layout, memory_limit, "pass fewer products")
    sketch = _Sketch(operator, layout, k, seed)
    return Estimate(*map(float, sketch.estimate()), 2 * k)


class _Sketch:
    """Random vectors `W`, an orthonormal basis `Q` of `A W`, and what the estimates are made of, in float64.

    `R = Q'A W`, `H = Q'A Q`, `C = Q'W`, and for each random vector `w'Aw` and `w'w`.
    """

    def __init__(self, operator, layout, k, seed):
        rank, Q, R, C = 0, np.zeros((k, layout.size), layout.dtype), np.zeros((k, k)), np.zeros((k, k))
        quadratic, squares = np.zeros(k), np.zeros(k)
        for i in range(k):
            w = layout.normal(seed, "sketch", i)
            y = layout.product(operator, w)
            quadratic[i], squares[i] = flat.dot(w, y), flat.dot(w, w)
            R[:, i], rank = _extend(Q, rank, y)
        for i in range(k):  # drawn once more: so they need not be kept
            C[:, i] = flat.coefficients(Q, layout.normal(seed, "sketch", i))
        H = np.array([flat.coefficients(Q[:rank], layout.product(operator, q)) for q in Q[:rank]]).reshape(rank, rank)
        self._size, self._matrices = layout.size, (R[:rank], H, C[:rank], quadratic, squares)

    def estimate(self):
        """`(value, standard error)`.

        The `tr_i` share most of their vectors, so their spread says too little: on spectra that fall off, errors are
        twice what it would allow. Where the rank is full the standard error is the jackknife's: how the mean changes
        when a vector is left out altogether. It is too large rather than too small.
        """
        R, H, C, quadratic, squares = self._matrices
        traces, k = self._leave_one_out(*self._matrices), len(quadratic)
        if len(R) < k:
            return traces.mean(), traces.std(ddof=1) / np.sqrt(k)
        means = np.zeros(k)
        for j in range(k):
            Q, rest = np.linalg.qr(np.delete(R, j, 1))
            of_vectors = [np.delete(numbers, j) for numbers in (quadratic, squares)]
            means[j] = self._leave_one_out(rest, Q.T @ H @ Q, Q.T @ np.delete(C, j, 1), *of_vectors).mean()
        return traces.mean(), np.sqrt((k - 1) * means.var())

    def _leave_one_out(self, R, H, C, quadratic, squares):
        """`tr_i` for each random vector."""
        rank, k = R.shape
        # the unit vector in Q that the other products are orthogonal to; there is none where the rank is below k
        S = np.linalg.inv(R).T if rank == k else np.zeros((rank, k))
        S = S / np.maximum(np.linalg.norm(S, axis=0), np.finfo(np.float64).tiny)
        X = C - S * (S * C).sum(0)  # Q_i'w_i, in coordinates of Q
        left = quadratic - 2 * (X * R).sum(0) + (X * (H @ X)).sum(0)
        length = squares - (X * X).sum(0)
        outside = self._size - rank + (1 if rank == k else 0)
        share = np.divide(outside * left, length, out=np.zeros(k), where=length > 1e-12 * squares)
        return np.trace(H) - (S * (H @ S)).sum(0) + share


def _extend(Q, rank, y):
    """Make `y` the next row of an orthonormal basis, unless it lies in it; its coordinates, and the new rank."""
    size, coordinates = flat.norm(y), np.zeros(len(Q))
    for _ in range(2):
        along = flat.coefficients(Q, y)  # rows that are still to come are zero
        y = y - flat.combination(Q, along)
        coordinates += along
    left = flat.norm(y)
    if left <= DEPENDENT * np.finfo(y.dtype).eps * size:
        return coordinates, rank
    Q[rank], coordinates[rank] = y / y.dtype.type(left), left
    return coordinates, rank + 1


def diagonal(operator, like, products=100, seed=0):
    """The diagonal as the mean of `z * Az` over vectors `z` of random signs, with its standard errors.

    The standard error of entry `i` is about `sqrt(sum_{j != i} a_ij^2 / products)`: for a network, 100 products leave
    the sign of small entries open.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: How many, at least 2. Defaults to `100`.
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
        squares += change * (sample - mean)  # Welford's
    stderr = np.sqrt(squares / (products * (products - 1)))
    return layout.unpack(mean), layout.unpack(stderr)


def squared_frobenius(operator, like, products=30, seed=0):
    """`|A|_F^2`, the sum of the squared eigenvalues, as the mean of `|Az|^2` over random signs, an `Estimate`.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        products: How many, at least 2. Defaults to `30`.
        seed: Of the random vectors, an integer. Defaults to `0`.

    Example: `squared_frobenius(curvature, gradient).value ** 0.5`
    """
    check_count(squared_frobenius, "products", products, low=2)
    layout = flat.Layout(like)
    images = (layout.product(operator, layout.signs(seed, "trace", i)) for i in range(products))
    return _estimate(np.array([flat.dot(image, image) for image in images]), products)


def _estimate(samples, products):
    """The mean of samples, with its standard error."""
    return Estimate(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples))), products)


def _check_parts(asked_by, parts, count):
    valid = parts is None or (
        isinstance(parts, dict) and all(0 <= i < count for indices in parts.values() for i in indices)
    )
    check(asked_by, "parts", parts, valid, f"a dict of names to lists of indices in [0, {count})")
