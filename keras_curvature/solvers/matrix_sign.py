"""The matrix sign: the orthogonal matrix nearest to each matrix of a stack, by matrix products only.

With the singular value decomposition `X = U S V'`, the sign is `U V'`. Each step applies an odd polynomial to all
singular values at once, without computing them:

    X <- a X + b (X X') X + c (X X')^2 X        s <- a s + b s^3 + c s^5

The first `X` is divided by an upper bound on its largest singular value. Singular values far below the bound need more
steps. No method converges to exactly 1, except for `"cubic"`; optimizers do not need it.

A zero matrix has the sign zero. The size of a matrix has no effect on its sign, from the smallest normal numbers on.
"""

import dataclasses
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import tensorflow as tf

from keras_curvature.component import Component, check, check_choice, check_count, register
from keras_curvature.trees import rounds_products

Bound: TypeAlias = Literal["frobenius", "gram"]

CUBIC = ((1.5, -0.5, 0.0),)
JORDAN = ((3.4445, -4.7750, 2.0315),)
QUINTIC = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip
SETS = {"jordan": JORDAN, "quintic": QUINTIC, "cubic": CUBIC}
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    (1.875, -1.25, 0.375),
)

LARGEST_GROWTH = 1000.0  # its square times the rounding error of float32 is 0.1


class MatrixSign(Component):
    """Base of the methods: a subclass is a frozen dataclass with the fields `steps` and `bound`."""

    steps: int  # no field: the subclasses have their fields in their own order
    bound: Bound
    margin: ClassVar[float] = 1.0  # the bound is multiplied by it

    def sign(self, matrices: tf.Tensor) -> tf.Tensor:
        """`U p(S) V'` of a stack `(..., rows, columns)` with `rows <= columns`, where `p` is close to 1."""
        X = _in_range(matrices)
        A = tf.matmul(X, X, transpose_b=True)
        scale = tf.math.reciprocal_no_nan(self.margin * self._bound_on(X, A))
        X, A = scale * X, scale * scale * A
        polynomials = self._polynomials()
        # through the Gram matrix, 4 products of (rows, rows) for each step, instead of 1 of them and 2 with the columns
        rows, columns = matrices.shape[-2:]
        cheaper = (4 * self.steps - 3) * rows < (2 * self.steps - 2) * columns + self.steps * rows
        return (_through_gram if cheaper and not rounds_products() else _directly)(X, A, polynomials)

    def values(self, s: np.ndarray) -> np.ndarray:
        """The polynomial `p` itself, of singular values that are already divided by the bound; a NumPy array."""
        for a, b, c in self._polynomials():
            s = a * s + b * s**3 + c * s**5
        return s

    def _bound_on(self, X, A):
        """An upper bound on the largest singular value, `(..., 1, 1)`."""
        if self.bound == "frobenius":
            return tf.norm(X, axis=(-2, -1), keepdims=True)
        return tf.sqrt(tf.norm(A, axis=(-2, -1), keepdims=True))

    def _polynomials(self):
        """The coefficients of each step; the last ones of the list are repeated."""
        listed = self._listed()
        return [listed[min(i, len(listed) - 1)] for i in range(self.steps)]

    def _listed(self):
        raise NotImplementedError(f"`{type(self).__name__}` must implement `_listed()`.")

    def __post_init__(self):
        check_count(self, "steps", self.steps)
        check_choice(self, "bound", self.bound, ("frobenius", "gram"))


@register
@dataclasses.dataclass(frozen=True)
class NewtonSchulz(MatrixSign):
    """The matrix sign by Newton-Schulz iterations with tuned coefficients.

    After five steps, singular values of at least 0.01 of the bound end in [0.68, 1.13] with `"jordan"`, in
    [0.98, 1.03] with `"quintic"`, and in [0.08, 1] with `"cubic"`, the classical iteration, which converges to 1.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), for `"jordan"` and the
    iteration; the coefficients of `"quintic"` are those of github.com/NVIDIA-NeMo/Emerging-Optimizers; Higham,
    "Functions of matrices" (2008), equation 8.20, for `"cubic"`. Differences: (1) in the precision of the matrices
    (there bfloat16); (2) on a CPU, of a matrix with many more columns than rows only `X X'` is iterated.

    Args:
        coefficients: `"jordan"`, `"quintic"` or `"cubic"`. Defaults to `"jordan"`.
        steps: Number of iterations. Defaults to `5` (Jordan et al.).
        bound: The bound on the largest singular value: `"frobenius"`, `|X|`, or `"gram"`, `|X X'|^(1/2)`. The second
            is at most the first and often a quarter of it, which saves about one step. Defaults to `"frobenius"`
            (Jordan et al.).

    Example: `Muon(sign=NewtonSchulz("quintic"))`
    """

    coefficients: Literal["jordan", "quintic", "cubic"] = "jordan"
    steps: int = 5
    bound: Bound = "frobenius"

    def __post_init__(self):
        known = isinstance(self.coefficients, str) and self.coefficients in SETS
        check(self, "coefficients", self.coefficients, known, '"jordan", "quintic" or "cubic"')
        super().__post_init__()

    def _listed(self):
        return SETS[self.coefficients]


@register
@dataclasses.dataclass(frozen=True)
class PolarExpress(MatrixSign):
    """The matrix sign by the polynomials that are best in each step for what the steps before it leave.

    After five steps, singular values of at least 0.001 of the bound end in [0.85, 1.14]; each further step is a quintic
    Newton-Schulz iteration, which converges to 1.

    Reference: Amsel, Persson, Musco and Gower, "The Polar Express: Optimal matrix sign methods and their application to
    the Muon algorithm" (2025), with the coefficients of github.com/microsoft/dion. Differences: as of `NewtonSchulz`;
    and `bound="gram"` is not in the paper.

    Args:
        steps: Number of iterations. Defaults to `5` (the authors).
        bound: As for `NewtonSchulz`. Defaults to `"frobenius"` (the authors).

    Example: `Muon(sign=PolarExpress(steps=6))`
    """

    steps: int = 5
    bound: Bound = "frobenius"
    margin: ClassVar[float] = 1.02  # the authors'

    def _listed(self):
        return POLAR_EXPRESS


def _in_range(matrices):
    """Each matrix divided by its largest entry, so that squares neither overflow nor vanish; zeros stay zeros."""
    return matrices * tf.math.reciprocal_no_nan(tf.reduce_max(tf.abs(matrices), axis=(-2, -1), keepdims=True))


def _directly(X, A, polynomials):
    """All steps on `X`; `A` is the first `X X'`."""
    for i, (a, b, c) in enumerate(polynomials):
        A = tf.matmul(X, X, transpose_b=True) if i else A
        B = b * A if c == 0 else b * A + c * tf.matmul(A, A)
        X = a * X + tf.matmul(B, X)
    return X


def _through_gram(X, A, polynomials):
    """The same with `Q A Q` in place of `X X'`, for `Q` the product of the polynomials so far, and one product by `X`.

    Each step multiplies the rounding errors of `A` by up to `a^2`. After a growth of `LARGEST_GROWTH`, `X X'` is
    computed anew.
    """
    eye, Q, growth = tf.eye(A.shape[-1], dtype=A.dtype), None, 1.0
    for i, (a, b, c) in enumerate(polynomials):
        if growth * a > LARGEST_GROWTH:
            X, Q, growth = tf.matmul(Q, X), None, 1.0
            A = tf.matmul(X, X, transpose_b=True)
        q = a * eye + (b * A if c == 0 else b * A + c * tf.matmul(A, A))
        Q, growth = q if Q is None else tf.matmul(q, Q), growth * a
        if i < len(polynomials) - 1 and growth * polynomials[i + 1][0] <= LARGEST_GROWTH:
            A = tf.matmul(q, tf.matmul(A, q))
    return tf.matmul(Q, X)
