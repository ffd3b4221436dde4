"""The quadratic model of a loss around the weights, and its damped minimum: with the rows as an array, or without.

    q(d) = g'd + 1/2 d'Gd,      d = argmin_d  q(d) + 1/2 lambda |D (d - c)|^2

`WithRows` has the rows of the Jacobian as an array, `WithGram` their Gram matrix by layers, `WithProducts` multiplies
by `G`. All have the same methods.
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.jacobian import roots
from keras_curvature.operators import Identity, Scaled
from keras_curvature.solvers import ConjugateGradient, least_squares

WAYS = ("rows", "weights", "qr", "svd")
EXPECTED = '"auto", "rows", "weights", "qr", "svd", or a component such as `ConjugateGradient(max_steps=50)`'
# Up to so many weights, a batch of unknown size is solved in the weights.
FEW = 2048
# Most multiplications of a QR decomposition, a quarter of a second of one core: it takes about ten times as long as
# Cholesky's of the normal equations.
QUICK = 5e8


def made(lin, solver, memory, undamped, scaling, rows=None, operator=None):
    """The local model for the argument `solver` of an optimizer.

    Args:
        lin: The `Linearization`.
        solver: `"auto"`, one of `WAYS`, or a `ConjugateGradient`.
        memory: The most bytes that the array of rows may take.
        undamped: Whether there is no damping.
        scaling: The scaling of the damping, `"identity"` or another, which needs the rows.
        rows, operator: `A` and `G`. Default to those of the Gauss-Newton matrix.
    """
    operator = lin.gauss_newton if operator is None else operator
    if isinstance(solver, ConjugateGradient):
        return WithProducts(lin, solver, operator())
    # one for the choice and the model: replicas gather its residuals once
    rows = lin.rows(memory) if rows is None else rows
    if scaling == "identity" and not undamped and _is_solved_by_layers(lin, rows, solver, memory):
        return WithGram(lin, rows)
    if solver == "auto":
        solver = _chosen(lin, rows, memory, undamped)
        if solver is None and scaling == "identity" and not undamped:
            return WithProducts(lin, ConjugateGradient(), operator())
    return WithRows(lin, rows, solver or "rows", undamped)


def _chosen(lin, rows, memory, undamped):
    """One of `WAYS` by size; `None` where the rows do not fit, or are not known."""
    if roots.objection(lin.model) is not None:
        return None
    count, n = rows.count, trees.count(lin.weights)
    size = trees.scalar_dtype(lin.weights).size
    if count is None and n > FEW:
        return None
    if count is not None and (count + min(count, n)) * max(count, n) * size > memory:
        return None
    if undamped:
        return "svd"
    if count is not None and count <= n:
        return "rows"
    return "qr" if n * n * (n + (count or n)) <= QUICK else "weights"


def _is_solved_by_layers(lin, rows, solver, memory):
    """Whether to solve in rows, with a Gram matrix by layers; `"auto"` needs a known number of rows that fits."""
    if solver not in ("auto", "rows") or roots.objection(lin.model) is not None:
        return False
    count = rows.count
    if solver == "auto" and (count is None or count > trees.count(lin.weights)):
        return False
    return rows.is_by_layers and (solver == "rows" or rows.bytes_of_gram <= memory)


class WithRows:
    """With the rows `A` as an array; everything inside is flat."""

    def __init__(self, lin, rows, way, undamped):
        self._rows, self.solved_by, self._like = rows, way, lin.weights
        self._A, remainder = self._rows.dense(), self._rows.remainder()
        self._r = tf.cast(self._rows.residual, self._A.dtype)
        self._rest = None if remainder is None else trees.flatten(remainder)
        self._l2, self._undamped, self._solve = None, undamped, None
        if any(lin.l2):
            self._l2 = trees.flatten([tf.fill(w.shape, tf.constant(c, w.dtype)) for c, w in zip(lin.l2, self._like)])

    def is_finite(self):
        """Whether the rows and the gradient are finite."""
        parts = [self._A, self._r, *([] if self._rest is None else [self._rest])]
        return tf.math.is_finite(tf.add_n([tf.reduce_sum(a) for a in parts]))

    def largest(self, scale, known):
        """The largest diagonal entry of `D^-1 G D^-1`; need not be right where `known`, a scalar."""
        squares = tf.reduce_sum(tf.square(self._A), 0)
        return tf.reduce_max(squares if scale is None else squares / tf.square(trees.flatten(scale)))

    def column_norms(self):
        """The norms of the columns of the rows, a vector."""
        return self._rows.column_norms()

    def decompose(self, damping, scale):
        """Decompose the system."""
        A = self._A
        metric = tf.ones([A.shape[1]], A.dtype) if scale is None else tf.square(trees.flatten(scale))
        E = tf.cast(damping, A.dtype) * metric
        if self._undamped:
            self._solve = self._shortest(metric)
            return
        if self._l2 is not None:
            E += self._l2
        how = {
            "rows": least_squares.in_rows, "weights": least_squares.in_weights, "qr": least_squares.by_qr,
            "svd": lambda A, E: least_squares.by_svd(A, E, E),
        }  # fmt: skip
        self._solve = how[self.solved_by](A, E)

    def _shortest(self, metric):
        """`solve` without damping; L2 regularizers are rows of their own, whose residuals are in the remainder."""
        A, zeros = self._A, tf.zeros_like(metric)
        if self._l2 is None:
            return least_squares.by_svd(A, zeros, metric)
        solve = least_squares.by_svd(tf.concat([A, tf.linalg.diag(tf.sqrt(self._l2))], 0), zeros, metric)
        return lambda r, b=None, c=None: solve(tf.concat([r, zeros], 0), b, c)

    def solve(self, center=None):
        """`d`, a vector; `center` is `c`."""
        b, c = self._rest, None
        if center is not None:
            c = trees.flatten(center)
            if self._l2 is not None:  # L2 regularizers do not pull to the center
                b = (0.0 if b is None else b) + self._l2 * c
        self._found = trees.unflatten(self._solve(self._r, b, c), self._like)
        return self._found

    def acceleration(self, path):
        """The next vector of the geodesic that begins with the list `path`: after `[d]` the acceleration."""
        bent = tf.cast(self._rows.bent(*path), self._A.dtype)
        return trees.unflatten(self._solve(bent), self._like)

    def slope(self, d):
        """`g'd`."""
        d = trees.flatten(d)
        along = tf.tensordot(self._r, tf.linalg.matvec(self._A, d), 1)
        return along if self._rest is None else along + tf.tensordot(self._rest, d, 1)

    def change(self, length):
        """`q(length * d)` of the solution `d`."""
        flat = trees.flatten(trees.scale(length, self._found))
        moved = tf.linalg.matvec(self._A, flat)
        curved = tf.tensordot(moved, moved, 1)
        if self._l2 is not None:
            curved += tf.reduce_sum(self._l2 * flat * flat)
        return length * self.slope(self._found) + 0.5 * curved

    def iterations(self):
        """0: of conjugate gradients."""
        return tf.constant(0.0)


class WithGram:
    """With the Gram matrix of the rows by layers, for a damping that is one number in each variable; no array of rows.

        d = p - E^-1 A' (A E^-1 A' + I)^-1 (r + A p),        p = c - E^-1 b

    A step by rows of a multilayer perceptron with 128 outputs then costs about two gradients.
    """

    solved_by = "rows"

    def __init__(self, lin, rows):
        self._rows, self._lin, self._r, self._rest = rows, lin, rows.residual, rows.remainder()

    def is_finite(self):
        """Whether the rows and the gradient are finite."""
        parts = [self._K, self._r, *([] if self._rest is None else self._rest)]
        return tf.math.is_finite(tf.add_n([tf.reduce_sum(tf.cast(a, self._K.dtype)) for a in parts]))

    def largest(self, scale, known):
        """The largest diagonal entry of `G`; need not be right where `known`, a scalar."""
        del scale
        dtype = self._r.dtype

        def look():
            return tf.reduce_max(tf.stack([tf.cast(tf.reduce_max(a), dtype) for a in self._rows.squared_columns()]))

        return tf.cond(known, lambda: tf.ones([], dtype), look)

    def decompose(self, damping, scale):
        """Decompose the system."""
        del scale
        self._E = [tf.cast(damping, self._r.dtype) + trees.exactly(c, self._r.dtype) for c in self._lin.l2]
        self._K = self._rows.gram([1.0 / e for e in self._E])
        self._lower = tf.linalg.cholesky(self._K + tf.eye(tf.shape(self._K)[0], dtype=self._K.dtype))

    def solve(self, center=None):
        """`d`, a vector; `center` is `c`."""
        b, p = self._rest, center
        if center is not None and any(self._lin.l2):  # L2 regularizers do not pull to the center
            pulled = [trees.exactly(c, a.dtype) * a for c, a in zip(self._lin.l2, center)]
            b = pulled if b is None else trees.add(b, pulled)
        if b is not None:
            p = trees.subtract(trees.zeros_like(b) if p is None else p, self._divided(b))
        moved = tf.zeros_like(self._r) if p is None else self._rows @ p
        self._found, self._moved = self._corrected(p, moved)
        return self._found

    def _corrected(self, p, moved):
        """`(d, A d)` from `p` and `A p`."""
        right = tf.cast(self._r + moved, self._K.dtype)
        u = tf.linalg.cholesky_solve(self._lower, right[:, tf.newaxis])[:, 0]
        d = trees.negative(self._divided(self._rows.transposed(u)))
        return (d if p is None else trees.add(p, d)), moved - tf.linalg.matvec(self._K, u)

    def _divided(self, v):
        return [a / tf.cast(e, a.dtype) for a, e in zip(v, self._E)]

    def acceleration(self, path):
        """The next vector of the geodesic that begins with the list `path`: after `[d]` the acceleration."""
        bent = tf.cast(self._rows.bent(*path), self._K.dtype)
        u = tf.linalg.cholesky_solve(self._lower, bent[:, tf.newaxis])[:, 0]
        return trees.negative(self._divided(self._rows.transposed(u)))

    def slope(self, d):
        """`g'd`."""
        return trees.dot(self._lin.gradient, d)

    def change(self, length):
        """`q(length * d)` of the solution `d`."""
        slope, curved = tf.tensordot(self._r, self._moved, 1), tf.tensordot(self._moved, self._moved, 1)
        if self._rest is not None:
            slope += trees.dot(self._rest, self._found)
        for c, a in zip(self._lin.l2, self._found):
            if c:
                curved += tf.cast(c * tf.reduce_sum(a * a), curved.dtype)
        return length * slope + 0.5 * length * length * curved

    def iterations(self):
        """0: of conjugate gradients."""
        return tf.constant(0.0)


class WithProducts:
    """With products by `G`, and conjugate gradients; `D` is the identity."""

    solved_by = "conjugate gradients"

    def __init__(self, lin, solver, operator):
        self._lin, self._solver, self._G, self._g = lin, solver, operator, lin.gradient
        self._found = None

    def is_finite(self):
        """Whether the products and the gradient are finite."""
        return trees.is_finite(self._g) & self._found.finite

    def largest(self, scale, known):
        """The curvature along the gradient, at most the largest eigenvalue."""
        return tf.math.divide_no_nan(self._G.quadratic_form(self._g, self._g), trees.squared_norm(self._g))

    def decompose(self, damping, scale):
        """Note the operator."""
        self._damping = damping
        self._A = self._G + Scaled(damping, Identity(), nonnegative=True)

    def solve(self, center=None):
        """`d`, a vector; `center` is `c`."""
        right = trees.negative(self._g) if center is None else trees.add(trees.negative(self._g), center, self._damping)
        self._found = self._solver.solve(self._A, right, center)
        return self._found.value

    def acceleration(self, path):
        """The next vector of the geodesic that begins with the list `path`: after `[d]` the acceleration."""
        return self._solver.solve(self._A, trees.negative(self._lin.rows().pulled_bent(*path))).value

    def slope(self, d):
        """`g'd`."""
        return trees.dot(self._g, d)

    def change(self, length):
        """`q(length * d)` of the solution `d`."""
        d = trees.scale(length, self._found.value)
        return self.slope(d) + 0.5 * self._G.quadratic_form(d, d)

    def iterations(self):
        """Of conjugate gradients, for the step."""
        return self._found.steps
