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

import dataclasses

import numpy as np

from keras_curvature import trees
from keras_curvature.component import check, check_count, check_number
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers import flat
from keras_curvature.solvers.spectra import Density, Tridiagonal

# Vectors that a restart keeps beyond those asked for, and room to go on with.
KEPT, ROOM = 5, 20
# A beta below so many roundings of the norm of T is zero: what is left is rounding.
ROUNDINGS = 10
# Share of a random vector in a warm start: were it an eigenvector, no other would ever be found.
FRESH = 1e-3
# An eigenvalue smaller than this share of the largest |eigenvalue| is found to that share's tolerance.
SMALL = 1e-2
MEMORY_LIMIT = 8e9
FEWER = "pass fewer steps, or choose fewer weights with layers=[...]"


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors as far as they were found.

    Attributes:
        values: float64 `(k,)`; largest first, or smallest first where these were asked for.
        vectors: `k` vectors of length 1, orthogonal to each other.
        residuals: `|A x - theta x|` with the rounding that the products were seen to have, float64 `(k,)`: an
            eigenvalue lies within it.
        products: How many products it took.
        converged: Whether each residual is within the tolerance, or as small as rounding allows, booleans `(k,)`.
        exhausted: Whether the method ended because its vectors span an invariant subspace: the eigenvalues are exact,
            and where they are fewer than asked for, no more can be found from this start.
    """

    values: np.ndarray
    vectors: list = dataclasses.field(repr=False)  # print as long as a model
    residuals: np.ndarray
    products: int
    converged: np.ndarray
    exhausted: bool = False

    def beside(self, other):
        """These pairs and those after them, such as of the other end; both must be of one operator."""
        arrays = (np.append(getattr(self, name), getattr(other, name)) for name in ("values", "residuals", "converged"))
        values, residuals, converged = arrays
        products, exhausted = self.products + other.products, self.exhausted or other.exhausted
        return Eigenpairs(values, [*self.vectors, *other.vectors], residuals, products, converged, exhausted)


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

    Example: `tridiagonalize(probes, gradient, 10).matrix`
    """
    check_count(tridiagonalize, "steps", steps)
    rows = min(steps, trees.count(start)) if basis else 0
    flat.check_memory(2 * rows, flat.Layout(start), memory_limit, FEWER)
    process = _Process(operator, start, rows, metric)
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

    Example: `eigenpairs(probes, probes.gradient(), k=5).values`
    """
    check_count(eigenpairs, "k", k)
    check_number(eigenpairs, "tolerance", tolerance, low=0, open_low=True)
    check(eigenpairs, "most_negative", most_negative, isinstance(most_negative, bool), "True or False")
    check_number(eigenpairs, "memory_limit", memory_limit, low=0)
    most = max_products if max_products is not None else 300 + 20 * k
    check_count(eigenpairs, "max_products", most)
    k = min(k, trees.count(like))  # there are no more
    rows = min(k + ROOM, trees.count(like))
    _check_memory(rows, k, flat.Layout(like), memory_limit)
    process = _Process(operator, like, rows, metric)
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

    Example: `largest, smallest = extremes(probes, gradient, 5, start=trees.add(u, v))`
    """
    check_count(extremes, "steps", steps)
    rows = min(steps, trees.count(like))
    flat.check_memory(rows + 2, flat.Layout(like), memory_limit, FEWER)
    process = _Process(operator, like, rows, metric)
    process.begin(process.first(start, seed))
    process.fill()
    ends = [process.ritz(1, 1e-3, most_negative) for most_negative in (False, True)]
    return tuple(process.eigenpairs(end) for end in ends)


def density(operator, like, probes=4, steps=60, seed=0, pairs=None, memory_limit=MEMORY_LIMIT):
    """The spectral density, a `Density`, by stochastic Lanczos quadrature; no basis, the memory of three vectors.

    For each of the random unit vectors: the nodes are the eigenvalues of `T`, the weights the squared first entries of
    its eigenvectors. For many weights the distance to the true density is at most `12 / steps` of its range
    (Wasserstein distance, with high probability) from one probe; several reduce the noise in the weights of outliers.

    Where eigenpairs are known, each of their values has its weight `1/n`, and random vectors orthogonal to theirs are
    asked for the rest of the spectrum alone, whose range is what the steps have to resolve then.

    Reference: Chen, Trogdon and Ubaru, "Analysis of stochastic Lanczos quadrature for spectrum approximation" (2021).

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        probes: How many random vectors. Defaults to `4`.
        steps: Products for each, but no more than there are eigenvalues. Defaults to `60`.
        seed: Of the random vectors, an integer. Defaults to `0`.
        pairs: `Eigenpairs` that are known, of either end or both. Optional.
        memory_limit: Most bytes for the vectors of `pairs`. Defaults to `8e9`.

    Raises:
        ValueError: A product is not finite; the vectors of `pairs` would take more than `memory_limit`.

    Example: `density(probes, gradient).quantile([0.1, 0.5, 0.9])`
    """
    check_count(density, "probes", probes)
    check_count(density, "steps", steps)
    values, layout = np.zeros(0) if pairs is None else np.asarray(pairs.values, np.float64), flat.Layout(like)
    flat.check_memory(len(values), layout, memory_limit, "pass fewer pairs")
    rest = flat.Complement(np.stack([layout.pack(u) for u in pairs.vectors])) if len(values) else None
    size = np.abs(values).max(initial=0.0)
    runs = []
    for number in range(probes):
        process = _Process(operator, like, 0, None, rest, size)
        alpha = beta = np.zeros(0)
        if len(values) < layout.size:  # else all is known
            process.begin(process.project(layout.normal(seed, "density", number)))
            alpha, beta = process.run_without_basis(min(steps, layout.size - len(values)))
        runs.append(Tridiagonal(alpha, beta, None, process.products, process.exhausted))
    return Density.of_runs(runs, layout.size, values)


@dataclasses.dataclass(frozen=True)
class _Ritz:
    """Ritz values at one end, their coefficients in the basis (columns), residuals, and whether these are small."""

    values: np.ndarray
    coefficients: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray


class _Process:
    """A Lanczos process that is under way: the basis, `T`, and the next vector.

    Attributes:
        rows: How many vectors the basis has room for.
        count: How many there are.
        T: `V'AV`, float64, tridiagonal; after a restart with one full row and column.
        beta: The length of what the basis does not hold of its image.
        exhausted: Whether that is zero.
        products: How many there were.

    Args:
        rest: The `flat.Complement` to stay in. Optional.
        size: Of the eigenvalues outside of it, for what is rounding.
    """

    def __init__(self, operator, like, rows, metric, rest=None, size=0.0):
        valid = metric is None or isinstance(metric, LinearOperator)
        check(eigenpairs, "metric", metric, valid, "a `LinearOperator`, or None")
        self.layout, self._like = flat.Layout(like), like
        self._operator, self._metric, self._rest, self._outside = operator, metric, rest, size
        self.rows, self.count, self.products = rows, 0, 0
        self.T, self._V = np.zeros((rows, rows)), np.zeros((rows, self.layout.size), self.layout.dtype)
        self.beta, self.exhausted = 0.0, False
        self._errors = np.zeros(rows)  # length of what each product had along the basis, and should not

    def project(self, w):
        """What `w` has in the complement, in place."""
        return w if self._rest is None else self._rest.project(w)

    def first(self, start, seed):
        """Where to begin: a random vector, or the one given with a little of that."""
        fresh = self.layout.normal(seed, "start")
        if start is None:
            return fresh
        trees.check("start", start, self._like)
        start = self.layout.pack(start)
        return start + fresh * fresh.dtype.type(FRESH * flat.norm(start) / flat.norm(fresh))

    def begin(self, vector):
        """Make this the next vector."""
        length = flat.norm(vector)
        if not 0 < length < np.inf:
            raise ValueError(f"`start` must be a vector that is finite and not zero. Received: one of length {length}")
        self._set_next(vector, *self._length(vector))

    def step(self):
        """One product: one more vector in the basis, a row and a column of `T`, and the next vector."""
        j = self.count
        w = self._image()
        self._V[j] = self._v
        if j:
            self._subtract_known(w, j)
        alpha = flat.dot(self._u, w)
        w -= w.dtype.type(alpha) * self._v
        V = self._V[: j + 1]
        errors = flat.coefficients(V, self._dual(w))
        w -= flat.combination(V, errors)
        self.T[j, j], self._errors[j], self.count = alpha, np.linalg.norm(errors), j + 1
        self._advance(w)

    def fill(self):
        """Steps until the basis is full, or exhausted."""
        while self.count < self.rows and not self.exhausted:
            self.step()

    def run_without_basis(self, steps):
        """`(alpha, beta)` of that many steps, or fewer, with two vectors."""
        alphas, betas = [], []
        before = None
        while len(alphas) < steps and not self.exhausted:
            w = self._image()
            if before is not None:
                w -= w.dtype.type(self.beta) * before
            alphas.append(flat.dot(self._u, w))
            w -= w.dtype.type(alphas[-1]) * self._v
            before = self._v
            self._advance(w, max(abs(a) for a in alphas) + max(betas, default=0.0))
            betas.append(self.beta)
        return np.array(alphas), np.array(betas)

    def ritz(self, k, tolerance, most_negative):
        """The `k` Ritz pairs at one end, or as many as there are, a `_Ritz`."""
        theta, S = np.linalg.eigh(self.T[: self.count, : self.count])
        order = np.arange(len(theta)) if most_negative else np.arange(len(theta))[::-1]
        order = order[:k]
        values, S = theta[order], S[:, order]
        left, size = self.beta * np.abs(S[-1]), np.abs(theta).max()
        rounded = self._seen(S) + self._rounding(size)
        goal = tolerance * np.maximum(np.abs(values), SMALL * size)
        return _Ritz(values, S, left + rounded, left <= np.maximum(goal, rounded))

    def restart(self, ritz):
        """Keep these Ritz vectors and the next vector, which is orthogonal to them, and nothing else."""
        k = len(ritz.values)
        flat.rotate(self._V[: self.count], ritz.coefficients)
        self._errors[:k] = self._seen(ritz.coefficients)
        self.T[:] = 0
        self.T[:k, :k] = np.diag(ritz.values)
        self.T[:k, k] = self.T[k, :k] = self.beta * ritz.coefficients[-1]
        self.count = k

    def eigenpairs(self, ritz):
        """The Ritz pairs with their vectors."""
        V = self._V[: self.count]
        vectors = [self.layout.unpack(flat.combination(V, s)) for s in ritz.coefficients.T]
        return Eigenpairs(ritz.values, vectors, ritz.residuals, self.products, ritz.converged, self.exhausted)

    def basis(self):
        """The vectors, as lists."""
        return [self.layout.unpack(v) for v in self._V[: self.count]]

    def _image(self):
        self.products += 1
        return self.project(self.layout.product(self._operator, self._u))

    def _seen(self, S):
        """The rounding that was seen in the products of the basis, in these combinations of it."""
        return np.sqrt(self._errors[: self.count] ** 2 @ S**2)

    def _dual(self, w):
        """`M w`."""
        return w if self._metric is None else self.layout.product(self._metric, w)

    def _subtract_known(self, w, j):
        """Take from `w` what it has along the vectors before: one of them, or after a restart all."""
        along = self.T[:j, j]
        if np.any(along[:-1]):
            w -= flat.combination(self._V[:j], along)
        else:
            w -= w.dtype.type(along[-1]) * self._V[j - 1]

    def _advance(self, w, size=None):
        """Make what is left of an image the next vector, unless it is rounding."""
        size = np.abs(self.T[: self.count, : self.count]).sum(0).max() if size is None else size
        self.beta, u = self._length(w)
        full = self.count == self.layout.size
        self.exhausted = bool(full or self.beta <= self._rounding(size))
        if self.exhausted:
            return
        if self.count < self.rows:
            self.T[self.count, self.count - 1] = self.T[self.count - 1, self.count] = self.beta
        self._set_next(w, self.beta, u)

    def _set_next(self, w, length, u):
        self._v = w / w.dtype.type(length)
        self._u = self._v if self._metric is None else u / w.dtype.type(length)

    def _length(self, w):
        """`sqrt(w'Mw)` and `M w`."""
        u = self._dual(w)
        square = flat.dot(w, u)
        if square < 0 or (square == 0 and w.any()):
            raise ValueError("`metric` must be positive definite. Received: one with a vector v for which v'Mv <= 0")
        return float(np.sqrt(square)), u

    def _rounding(self, size):
        return ROUNDINGS * np.finfo(self.layout.dtype).eps * max(size, self._outside)


def _check_memory(rows, k, layout, limit):
    """Refuse a basis, and the vectors that come out of it, that are too large; say what would fit."""
    fits = (int(limit // layout.bytes) - ROOM) // 2
    fewer = f"pass k={fits}, or " if 1 <= fits < k else ""
    flat.check_memory(rows + k, layout, limit, f"{fewer}choose fewer weights with layers=[...]")
