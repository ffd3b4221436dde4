"""Eigenvalues of symmetric operators by the Lanczos method: ends of the spectrum, and its density.

    w = A v_j - beta_{j-1} v_{j-1},   alpha_j = v_j'w,   w -= alpha_j v_j,   beta_j = |w|,   v_{j+1} = w / beta_j

With the eigenpairs `(theta, s)` of the tridiagonal matrix `T` of the alphas and betas, `theta` is a Ritz value,
`x = V s` its vector, and `|A x - theta x| = beta_m |s_m|` its residual, at no further product, in exact arithmetic; an
eigenvalue of `A` is never farther from `theta` than that. Products are rounded, in float32, TF32 or bfloat16: what they
have along vectors where they should have nothing is seen when the next vector is made orthogonal, and is part of the
residuals given here, which are never below 10 roundings of the largest eigenvalue.

It knows operators and vectors, never a model. The loop runs on the host, in NumPy, one product a step; `T` and all that
is made of it are in float64.

Reference: Parlett, "The symmetric eigenvalue problem" (1998), chapter 13; Wu and Simon, "Thick-restart Lanczos method"
(2000); Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017).

Multiplicity: from one start the Krylov space has one vector of each eigenspace. An eigenvalue that is there several
times is found once (rounding brings the others in later, if at all). A network's spectrum has none but zero.
"""

import numpy as np

from keras_curvature import trees
from keras_curvature.component import check, check_count, check_number
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers import flat
from keras_curvature.solvers.krylov import Process, Tridiagonal

# Vectors that a restart keeps beyond those asked for, and room to go on with.
KEPT, ROOM = 5, 20
MEMORY_LIMIT = 8e9
FEWER = "pass fewer steps, or choose fewer weights with layers=[...]"


def tridiagonalize(operator, start, steps, basis=True, metric=None, memory_limit=MEMORY_LIMIT):
    """So many steps of the Lanczos method, a `Tridiagonal`.

    Without a basis three vectors are held, and nothing is re-orthogonalized: eigenvalues come several times then, which
    does no harm to quadrature (`density`). With one, every new vector is made orthogonal to all before it in one pass,
    and beta is its length after that.

    Args:
        operator: A symmetric `LinearOperator`.
        start: The first vector, of any length but zero.
        steps: How many, an integer.
        basis: Whether to keep the vectors. Defaults to `True`.
        metric: See `eigenpairs`.
        memory_limit: Most bytes for the vectors. Defaults to `8e9`.

    Raises:
        ValueError: The vectors would take more than `memory_limit`; a product is not finite; `start` is zero.

    Example: `tridiagonalize(curvature, gradient, 10).matrix`
    """
    check_count(tridiagonalize, "steps", steps)
    _check_metric(tridiagonalize, metric)
    rows = min(steps, trees.count(start)) if basis else 0
    flat.check_memory(2 * rows, flat.Layout(start), memory_limit, FEWER)
    process = Process(operator, start, rows, metric)
    process.begin(process.layout.pack(start))
    if not basis:
        alpha, beta = process.run_without_basis(steps)
        return Tridiagonal(alpha, beta, None, process.products, process.exhausted)
    process.fill()
    T = process.T[: process.count, : process.count]
    beta = np.append(np.diag(T, -1), process.beta)
    return Tridiagonal(np.diag(T).copy(), beta, process.basis(), process.products, process.exhausted)


def eigenpairs(
    operator, like, k=10, tolerance=1e-3, most_negative=False, start=None, seed=0, max_products=None,
    memory_limit=MEMORY_LIMIT, metric=None,
):  # fmt: skip
    """The `k` algebraically largest (or smallest) eigenvalues with their vectors, `Eigenpairs`, by restarted Lanczos.

    Of a basis of `k + 20` vectors that is full, a restart keeps the `k + 5` Ritz vectors at the end that is asked for
    and goes on (thick restart). Convergence is looked at after every product. An eigenvalue that is there several times
    is found once.

    With a `metric` `M` the eigenvalues are those of `M^1/2 A M^1/2`, which are those of `M A` as well. No root is
    taken: `A M` is symmetric in the inner product `u'M v`, and Lanczos runs in that. With `M = P^-1`, an optimizer's
    preconditioner, this is the curvature that its step sees. The vectors are `x` with `A M x = theta x` and `x'M x = 1`
    then; `M x` is the direction in weight space; residuals are lengths in that inner product.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        k: How many. Defaults to `10`.
        tolerance: Largest residual, relative to the eigenvalue's size, or to 1 % of the largest's where that is more.
            Defaults to `1e-3`.
        most_negative: Whether to find the smallest eigenvalues and not the largest. Defaults to `False`.
        start: The first vector. Defaults to a random one. A sum of the eigenvectors of some steps ago saves products.
        seed: Of the random vectors, an integer. Defaults to `0`.
        max_products: Most products; what was found until then comes back, and `converged` says which pairs are within
            the tolerance. Defaults to `300 + 20 k`.
        memory_limit: Most bytes for the vectors. Defaults to `8e9`.
        metric: A positive definite `LinearOperator`. Optional.

    Raises:
        ValueError: The vectors would take more than `memory_limit`, with the bytes and the remedy; a product is not
            finite; `start` is zero; `metric` is not positive definite.

    Example: `eigenpairs(curvature, curvature.gradient, k=5).values`
    """
    check_count(eigenpairs, "k", k)
    _check_metric(eigenpairs, metric)
    check_number(eigenpairs, "tolerance", tolerance, low=0, open_low=True)
    check(eigenpairs, "most_negative", most_negative, isinstance(most_negative, bool), "True or False")
    check_number(eigenpairs, "memory_limit", memory_limit, low=0)
    most = max_products if max_products is not None else 300 + 20 * k
    check_count(eigenpairs, "max_products", most)
    k = min(k, trees.count(like))  # there are no more
    rows = min(k + ROOM, trees.count(like))
    _check_memory(rows, k, flat.Layout(like), memory_limit)
    process = Process(operator, like, rows, metric)
    process.begin(process.first(start, seed))
    while True:
        process.step()
        ritz = process.ritz(k, tolerance, most_negative)
        done = process.count >= k and ritz.converged.all()
        if process.exhausted or done or process.products >= most:
            return process.eigenpairs(ritz)
        if process.count == process.rows:
            process.restart(process.ritz(min(k + KEPT, rows - 1), tolerance, most_negative))


def extremes(operator, like, steps=10, start=None, seed=0, metric=None, memory_limit=MEMORY_LIMIT):
    """The largest and the smallest eigenvalue of one run of so many steps, `(Eigenpairs, Eigenpairs)` of one each.

    For watching a model train: a fixed number of products, and a warm start. From the sum of both vectors of the last
    time, 5 steps find the largest eigenvalue to about 1e-4; from a random start, 10 do.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        steps: How many products. Defaults to `10`.
        start: A vector, such as `trees.add(largest.vectors[0], smallest.vectors[0])` of the last time. Defaults to a
            random one.
        seed: Of the random vector, an integer. Defaults to `0`.
        metric: See `eigenpairs`.
        memory_limit: Most bytes for the vectors, of which there are `steps`. Defaults to `8e9`.

    Raises:
        ValueError: As `eigenpairs`.

    Example: `largest, smallest = extremes(curvature, gradient, 5, start=trees.add(u, v))`
    """
    check_count(extremes, "steps", steps)
    _check_metric(extremes, metric)
    rows = min(steps, trees.count(like))
    flat.check_memory(rows + 2, flat.Layout(like), memory_limit, FEWER)
    process = Process(operator, like, rows, metric)
    process.begin(process.first(start, seed))
    process.fill()
    ends = [process.ritz(1, 1e-3, most_negative) for most_negative in (False, True)]
    return tuple(process.eigenpairs(end) for end in ends)


def _check_metric(owner, metric):
    check(owner, "metric", metric, metric is None or isinstance(metric, LinearOperator), "a `LinearOperator`, or None")


def _check_memory(rows, k, layout, limit):
    """Refuse a basis, and the vectors that come out of it, that are too large; say what would fit."""
    fits = (int(limit // layout.bytes) - ROOM) // 2
    fewer = f"pass k={fits}, or " if 1 <= fits < k else ""
    flat.check_memory(rows + k, layout, limit, f"{fewer}choose fewer weights with layers=[...]")
