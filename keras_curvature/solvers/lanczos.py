"""Eigenvalues of symmetric operators by the Lanczos method: both ends of the spectrum, and its density.

    w = A v_j - beta_{j-1} v_{j-1},   alpha_j = v_j'w,   w -= alpha_j v_j,   beta_j = |w|,   v_{j+1} = w / beta_j

`T` is the tridiagonal matrix of the alphas and betas. For each of its eigenpairs `(theta, s)`, `theta` is a Ritz value,
`x = V s` its Ritz vector, and in exact arithmetic `|A x - theta x| = beta_m |s_m|` its residual, without another
product. An eigenvalue of `A` is within this distance of `theta`. But products are rounded, in float32, TF32 or
bfloat16. The rounding errors appear as components along earlier vectors when the next vector is orthogonalized. The
residuals here include them, and are never below 10 rounding errors of the largest eigenvalue.

The loop runs on the host in NumPy, with one product per step. `T` and everything derived from it are in float64.

Reference: Parlett, "The symmetric eigenvalue problem" (1998), chapter 13; Wu and Simon, "Thick-restart Lanczos method"
(2000); Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017).

Multiplicity: a Krylov space has one vector of each eigenspace, so one run finds one copy of a multiple eigenvalue
(rounding errors may find others later). Multiple eigenvalues are common: the Hessian of a last `Dense` layer under the
squared error is `A (x) I`, so each of its eigenvalues has as many copies as the layer has outputs. `solvers/copies.py`
finds the others for `eigenpairs`. Quadratures need no copies: the weight of a node is that of the whole eigenspace.
"""

import numpy as np

from keras_curvature import trees
from keras_curvature.component import check, check_count, check_flag, check_number
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers import flat
from keras_curvature.solvers.copies import Found
from keras_curvature.solvers.krylov import Process, Tridiagonal

# The basis has room for `k + ROOM` vectors.
ROOM = 20
MEMORY_LIMIT = 8e9
FEWER = "pass fewer steps, or choose fewer weights with layers=[...]"


def tridiagonalize(operator, start, steps, basis=True, metric=None, memory_limit=MEMORY_LIMIT):
    """Run the Lanczos method for some steps.

    Without a basis only three vectors are kept and nothing is re-orthogonalized. Eigenvalues then appear several times,
    which does not affect quadrature (`density`). With a basis, every new vector is orthogonalized against all earlier
    vectors in one pass, and beta is its norm afterwards.

    Args:
        operator: A symmetric `LinearOperator`.
        start: The first vector, of any nonzero norm.
        steps: Number of steps, an integer.
        basis: Whether to keep the vectors. Defaults to `True`.
        metric: See `eigenpairs`.
        memory_limit: Largest number of bytes for the vectors. Defaults to `8e9`.

    Returns:
        A `Tridiagonal`.

    Raises:
        ValueError: The vectors need more than `memory_limit`, a product is not finite, `start` is zero, or `metric` is
            not positive definite.

    Example: `tridiagonalize(curvature, gradient, 10).matrix`
    """
    check_count(tridiagonalize, "steps", steps)
    _check_metric(tridiagonalize, metric)
    rows = min(steps, trees.count(start)) if basis else 0
    flat.check_memory(2 * rows, flat.Layout(start), memory_limit, FEWER)
    process = Process(operator, start, rows, metric)
    process.begin(flat.scaled("start", process.layout.pack(start))[0])
    if not basis:
        alpha, beta = process.run_without_basis(steps)
        return Tridiagonal(alpha, beta, None, process.products, process.exhausted)
    process.fill()
    T = process.T[: process.count, : process.count]
    beta = np.append(np.diag(T, -1), process.beta)
    return Tridiagonal(np.diag(T).copy(), beta, process.basis(), process.products, process.exhausted)


def eigenpairs(
    operator, like, k=10, tolerance=1e-3, most_negative=False, start=None, seed=0, max_products=None,
    memory_limit=MEMORY_LIMIT, metric=None, asked_by=None,
):  # fmt: skip
    """The `k` algebraically largest (or smallest) eigenvalues and their eigenvectors, by restarted Lanczos.

    When the basis of `k + 20` vectors is full, a thick restart keeps the `k + 5` Ritz vectors at the wanted end of the
    spectrum. Convergence is checked after every product.

    For `k > 1` a second run from a random start searches the orthogonal complement of the pairs found, for copies of
    multiple eigenvalues and whatever else is larger than the `k`-th pair. What it finds is taken in, and the next run
    searches again, until one finds nothing. So the last run only shows that nothing is missing. It takes at least 10
    products; fewer where the complement has fewer different eigenvalues. For `k = 1` there is no second run.

    With a `metric` `M` the eigenvalues are those of `M^1/2 A M^1/2`, which are also those of `M A`. No root is
    computed: `A M` is symmetric in the inner product `u'M v`, and Lanczos runs in it. With `M = P^-1`, an optimizer's
    preconditioner, this is the curvature that its steps see. The vectors `x` then satisfy `A M x = theta x` and
    `x'M x = 1`; `M x` is the direction in weight space; residuals are norms in that inner product.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        k: Number of eigenpairs. Defaults to `10`.
        tolerance: Largest residual, relative to `|theta|`, or to 1 % of the largest `|theta|` if that is larger.
            Defaults to `1e-3`.
        most_negative: Whether to find the smallest eigenvalues instead. Defaults to `False`.
        start: The first vector. The sum of the eigenvectors that were found some training steps ago saves products.
            Defaults to a random vector.
        seed: Seed of the random vectors, an integer. Defaults to `0`.
        max_products: Largest number of products, of all runs together. If it is reached, `converged` says which pairs
            are within the tolerance, and copies of a multiple eigenvalue may be missing. Defaults to `300 + 20 k`.
        memory_limit: Largest number of bytes for the vectors. Defaults to `8e9`.
        metric: `M`, a positive definite `LinearOperator`. Defaults to the identity.
        asked_by: The function to name in messages. Defaults to `eigenpairs`.

    Returns:
        `Eigenpairs`.

    Raises:
        ValueError: The vectors need more than `memory_limit`, a product is not finite, `start` is zero, or `metric` is
            not positive definite.

    Example: `eigenpairs(curvature, curvature.gradient, k=5).values`
    """
    owner = asked_by or eigenpairs
    check_count(owner, "k", k)
    _check_metric(owner, metric)
    check_number(owner, "tolerance", tolerance, low=0, open_low=True)
    check_flag(owner, "most_negative", most_negative)
    check_number(owner, "memory_limit", memory_limit, low=0)
    most = max_products if max_products is not None else 300 + 20 * k
    check_count(owner, "max_products", most)
    k = min(k, trees.count(like))  # a matrix has no more eigenvalues
    # beside the basis: the vectors found, and their products with the metric
    sets = 1 if metric is None or k == 1 else 2
    _check_memory(min(k + ROOM, trees.count(like)), k, sets, flat.Layout(like), memory_limit)
    found = Found(operator, like, k, ROOM, metric, tolerance, most_negative)
    found.run(seed, start, most)
    while k > 1 and found.products < most and found.run_in_complement(seed, most):
        pass
    return found.eigenpairs()


def extremes(operator, like, steps=10, start=None, seed=0, metric=None, memory_limit=MEMORY_LIMIT, asked_by=None):
    """The largest and the smallest eigenvalue, from one Lanczos run of a fixed number of products.

    For monitoring during training, with a warm start: from the sum of both eigenvectors of the previous run, 5 steps
    find the largest eigenvalue to a relative error of about 1e-4; from a random start, 10 steps do.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        steps: Number of products. Defaults to `10`.
        start: A vector, such as `trees.add(largest.vectors[0], smallest.vectors[0])` of the previous run. Defaults to a
            random vector.
        seed: Seed of the random vector, an integer. Defaults to `0`.
        metric: See `eigenpairs`.
        memory_limit: Largest number of bytes for the `steps` vectors. Defaults to `8e9`.
        asked_by: The function to name in messages. Defaults to `extremes`.

    Returns:
        `(largest, smallest)`, `Eigenpairs` of one pair each.

    Raises:
        ValueError: As `eigenpairs`.

    Example: `largest, smallest = extremes(curvature, gradient, 5, start=trees.add(u, v))`
    """
    owner = asked_by or extremes
    check_count(owner, "steps", steps)
    _check_metric(owner, metric)
    rows = min(steps, trees.count(like))
    flat.check_memory(rows + 2, flat.Layout(like), memory_limit, FEWER)
    process = Process(operator, like, rows, metric)
    process.begin(process.first(start, seed))
    process.fill()
    ends = [process.ritz(1, 1e-3, most_negative) for most_negative in (False, True)]
    return tuple(process.eigenpairs(end) for end in ends)


def _check_metric(owner, metric):
    check(owner, "metric", metric, metric is None or isinstance(metric, LinearOperator), "a `LinearOperator`, or None")


def _check_memory(rows, k, sets, layout, limit):
    """Raise a `ValueError` if the basis and `sets` of `k` vectors need too much memory; it says which `k` fits."""
    fits = (int(limit // layout.bytes) - ROOM) // (1 + sets)
    fewer = f"pass k={fits}, or " if 1 <= fits < k else ""
    flat.check_memory(rows + sets * k, layout, limit, f"{fewer}choose fewer weights with layers=[...]")
