"""The state of a Lanczos run, and its results.

`solvers/lanczos.py` has the recurrence, the residuals, the references and the loop. Everything runs on the host in
NumPy; the tridiagonal matrix and everything derived from it are in float64.
"""

import dataclasses

import numpy as np

from keras_curvature import trees
from keras_curvature.solvers import flat
from keras_curvature.typing import Vector

# A beta below this many rounding errors of the norm of T counts as zero.
ROUNDINGS = 10
# Share of a random vector in a warm start. From an exact eigenvector, Lanczos would never find another one.
FRESH = 1e-3
# Tolerances are relative to |eigenvalue|, or to this share of the largest |eigenvalue| if that is larger.
SMALL = 1e-2
# A restart keeps so many vectors more than are wanted.
KEPT = 5


def goal(values, size, tolerance):
    """The largest residual that is within the tolerance, for each eigenvalue."""
    return tolerance * np.maximum(np.abs(values), SMALL * size)


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors.

    Attributes:
        values: float64 `(k,)`; largest first, or smallest first where the smallest were asked for.
        vectors: `k` vectors of length 1, orthogonal to each other.
        residuals: `|A x - theta x|`, including the observed rounding of the products, float64 `(k,)`. An eigenvalue of
            `A` is within this distance of `theta`.
        products: Number of products that were computed.
        converged: Whether each residual is within the tolerance, or as small as rounding allows; booleans `(k,)`.
        exhausted: Whether every search ended in an invariant subspace. The eigenvalues are then exact, up to rounding.
        matrix: The matrix in words, such as `"hessian of dense"`; empty where unknown.
    """

    values: np.ndarray
    vectors: list[Vector] = dataclasses.field(repr=False)  # as long as a model
    residuals: np.ndarray
    products: int
    converged: np.ndarray
    exhausted: bool = False
    matrix: str = ""

    def beside(self, other: "Eigenpairs") -> "Eigenpairs":
        """These pairs followed by other pairs of the same operator, such as those of the other end of the spectrum."""
        arrays = (np.append(getattr(self, name), getattr(other, name)) for name in ("values", "residuals", "converged"))
        values, residuals, converged = arrays
        products, exhausted = self.products + other.products, self.exhausted or other.exhausted
        matrix = self.matrix if self.matrix == other.matrix else f"{self.matrix} and {other.matrix}"
        return Eigenpairs(values, [*self.vectors, *other.vectors], residuals, products, converged, exhausted, matrix)


@dataclasses.dataclass(frozen=True)
class Tridiagonal:
    """`V'AV = T`, tridiagonal.

    Attributes:
        alpha: The diagonal, float64 `(steps,)`; shorter if an invariant subspace was found.
        beta: The off-diagonal, float64 `(steps,)`; the last entry is the norm of the part of `A V` outside `V`.
        basis: The vectors `V`, one for each alpha; `None` if they were not kept.
        products: Number of products that were computed.
        exhausted: Whether `V` spans an invariant subspace. The quadrature is then exact.
    """

    alpha: np.ndarray
    beta: np.ndarray
    basis: list[Vector] | None = dataclasses.field(repr=False)  # as long as a model
    products: int
    exhausted: bool = False

    @property
    def matrix(self) -> np.ndarray:
        """`T`, `(steps, steps)`."""
        return np.diag(self.alpha) + np.diag(self.beta[:-1], 1) + np.diag(self.beta[:-1], -1)

    def quadrature(self, steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`(nodes, weights)` with `v'f(A)v ~ sum_i weights_i f(nodes_i)`, `v` the first vector of `V`.

        Args:
            steps: Number of steps to use, from the first. Defaults to all.
        """
        nodes, vectors = np.linalg.eigh(self.matrix[:steps, :steps])
        return nodes, vectors[:1].ravel() ** 2


@dataclasses.dataclass(frozen=True)
class Ritz:
    """Ritz values at one end of the spectrum.

    Attributes:
        values: The Ritz values, `(k,)`.
        coefficients: The Ritz vectors in terms of the basis, columns `(count, k)`.
        residuals: As in `Eigenpairs`, `(k,)`.
        converged: As in `Eigenpairs`, `(k,)`.
        size: The largest |eigenvalue| known, which determines the rounding errors.
    """

    values: np.ndarray
    coefficients: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    size: float

    def first(self, count: int) -> "Ritz":
        """The first `count` of them."""
        kept = self.values[:count], self.coefficients[:, :count], self.residuals[:count], self.converged[:count]
        return Ritz(*kept, self.size)


class Process:
    """The state of a Lanczos run: the basis, `T`, and the next vector.

    Attributes:
        rows: Number of vectors that the basis has room for.
        count: Number of vectors in the basis.
        T: `V'AV`, float64; tridiagonal, and after a restart with one full row and column.
        beta: The norm of the part of the last product that is outside the basis.
        exhausted: Whether `beta` is zero, up to rounding.
        products: Number of products so far.

    Args:
        operator: A symmetric `LinearOperator`.
        like: A vector, for its shapes and dtypes.
        rows: Number of vectors that the basis has room for; `0`: no basis is kept.
        metric: See `lanczos.eigenpairs`; `None`: the identity.
        rest: The `flat.Complement` that all vectors are projected on. Optional.
        size: The largest |eigenvalue| outside `rest`, which determines the rounding errors. Defaults to `0.0`.
    """

    def __init__(self, operator, like, rows, metric, rest=None, size=0.0):
        self.layout, self._like = flat.Layout(like), like
        self._operator, self._metric, self._rest, self._outside = operator, metric, rest, size
        self.rows, self.count, self.products = rows, 0, 0
        self.T, self._V = np.zeros((rows, rows)), np.zeros((rows, self.layout.size), self.layout.dtype)
        self.beta, self.exhausted = 0.0, False
        self._errors = np.zeros(rows)  # length of each product's spurious component along the basis
        self._lost = np.zeros((rows, 0 if rest is None else rest.count))  # each product's part outside the complement

    def project(self, w):
        """Project `w` onto the complement, in place."""
        if self._rest is not None:
            self._rest.project(w)
        return w

    def first(self, start, seed):
        """The first vector: random, or `start` plus a small random part."""
        fresh = self.layout.normal(seed, "start")
        if start is None:
            return fresh
        trees.check("start", start, self._like)
        start, _ = flat.scaled("start", self.layout.pack(start))
        return start + fresh * fresh.dtype.type(FRESH * flat.norm(start) / flat.norm(fresh))

    def begin(self, vector):
        """Make this the next vector."""
        self._set_next(vector, *self._length(vector))

    def step(self):
        """Compute one product: add a vector to the basis and a row and a column to `T`, and find the next vector."""
        j = self.count
        w = self._image(j)
        self._V[j] = self._v
        if j:
            self._subtract_known(w, j)
        alpha = flat.dot(self._u, w)
        w -= w.dtype.type(alpha) * self._v
        V = self._V[: j + 1]
        errors = flat.coefficients(V, self._dual(w))
        w = self.project(w - flat.combination(V, errors))  # again: rounding errors may be all that is left
        self.T[j, j], self._errors[j], self.count = alpha, np.linalg.norm(errors), j + 1
        self._advance(w)

    def fill(self):
        """Step until the basis is full or spans an invariant subspace."""
        while self.count < self.rows and not self.exhausted:
            self.step()

    def search(self, wanted, most, tolerance, most_negative, done):
        """Step, with thick restarts, until `done(ritz)`, to an invariant subspace, or to `most` products; a `Ritz`."""
        while True:
            self.step()
            ritz = self.ritz(wanted, tolerance, most_negative)
            if self.exhausted or self.products >= most or done(ritz):
                return ritz
            if self.count == self.rows:
                self.restart(self.ritz(min(wanted + KEPT, self.rows - 1), tolerance, most_negative))

    def run_without_basis(self, steps):
        """`(alpha, beta)` of at most `steps` steps. Only the last two vectors are kept."""
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
        """The `k` Ritz pairs at one end of the spectrum, or all if there are fewer; a `Ritz`."""
        theta, S = np.linalg.eigh(self.T[: self.count, : self.count])
        order = np.arange(len(theta)) if most_negative else np.arange(len(theta))[::-1]
        order = order[:k]
        values, S = theta[order], S[:, order]
        size = max(np.abs(theta).max(), self._outside)
        left = np.hypot(self.beta * np.abs(S[-1]), np.linalg.norm(self._lost[: self.count].T @ S, axis=0))
        rounded = self._seen(S) + self._rounding(size)
        return Ritz(values, S, left + rounded, left <= np.maximum(goal(values, size, tolerance), rounded), size)

    def restart(self, ritz):
        """Thick restart: keep only these Ritz vectors, and the next vector, which is orthogonal to them."""
        k = len(ritz.values)
        flat.rotate(self._V[: self.count], ritz.coefficients)
        self._errors[:k] = self._seen(ritz.coefficients)
        self._lost[:k] = ritz.coefficients.T @ self._lost[: self.count]
        self.T[:] = 0
        self.T[:k, :k] = np.diag(ritz.values)
        self.T[:k, k] = self.T[k, :k] = self.beta * ritz.coefficients[-1]
        self.count = k

    def eigenpairs(self, ritz):
        """The Ritz pairs with their vectors, `Eigenpairs`."""
        vectors = [self.layout.unpack(v) for v in self.vectors(ritz)]
        return Eigenpairs(ritz.values, vectors, ritz.residuals, self.products, ritz.converged, self.exhausted)

    def vectors(self, ritz):
        """The Ritz vectors, flat arrays, one at a time."""
        return (flat.combination(self._V[: self.count], s) for s in ritz.coefficients.T)

    def basis(self):
        """The vectors of the basis, as lists of tensors."""
        return [self.layout.unpack(v) for v in self._V[: self.count]]

    def _image(self, row=None):
        """The product with the last vector, in the complement; `row` is the place of the part outside of it."""
        self.products += 1
        w = self.layout.product(self._operator, self._u)
        lost = np.zeros(0) if self._rest is None else self._rest.project(w)
        if row is not None:
            self._lost[row] = lost
        return w

    def _seen(self, S):
        """The observed rounding error of the products with the vectors `V S`."""
        return np.sqrt(self._errors[: self.count] ** 2 @ S**2)

    def _dual(self, w):
        """`M w`."""
        return w if self._metric is None else self.layout.product(self._metric, w)

    def _subtract_known(self, w, j):
        """Subtract from `w` its known components: along the last vector, or right after a restart along all."""
        along = self.T[:j, j]
        if np.any(along[:-1]):
            w -= flat.combination(self._V[:j], along)
        else:
            w -= w.dtype.type(along[-1]) * self._V[j - 1]

    def _advance(self, w, size=None):
        """Make the rest of a product the next vector, unless it is rounding error."""
        size = np.abs(self.T[: self.count, : self.count]).sum(0).max() if size is None else size
        self.beta, u = self._length(w)
        full = self.count + self._lost.shape[1] >= self.layout.size
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
            raise ValueError(
                f"`metric` must be positive definite. Received: an operator `M` with `v'Mv` = {square:.3g} for a "
                f"vector `v` of norm {flat.norm(w):.3g}"
            )
        return float(np.sqrt(square)), u

    def _rounding(self, size):
        return ROUNDINGS * np.finfo(self.layout.dtype).eps * max(size, self._outside)
