"""Solve linear systems with a curvature matrix."""

import dataclasses
import math
import warnings

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number
from keras_curvature.operators import Function, Identity
from keras_curvature.solvers import ConjugateGradient, flat
from keras_curvature.solvers.nystrom import NystromPreconditioner, sketch


def solve(curvature, operator, vector, damping, tolerance, max_products, rank, asked_by):
    """The solution of `(B + damping I) x = vector`; see `Curvature.solve`.

    Args:
        curvature: The `Curvature`, which finds the smallest eigenvalue.
        operator: The operator to multiply by: the same matrix.
        vector, damping, tolerance, max_products, rank: As in `Curvature.solve`.
        asked_by: The function to name in messages.
    """
    check_number(asked_by, "damping", damping, low=0)
    check_number(asked_by, "tolerance", tolerance, low=0, open_low=True)
    check_count(asked_by, "max_products", max_products)
    check_count(asked_by, "rank", rank, low=0)
    if rank >= max_products:
        raise ValueError(
            f"`Curvature.solve`: `rank` must be less than `max_products` ({max_products}). Received: rank={rank}"
        )
    vector, length = _unit(vector)
    if not curvature.psd:
        _check_positive(curvature, damping)
    rank = min(rank, trees.count(vector))
    solver = ConjugateGradient(max_products - rank, progress_tolerance=0.0, residual_tolerance=tolerance)
    damped = Function((operator + damping * Identity()).multiply, psd=True)
    preconditioner = None
    if rank:
        found = sketch(operator, vector, rank, tf.constant(curvature.objective.seed))
        preconditioner = NystromPreconditioner(found.vectors, found.values, damping)
    solution = solver.solve(damped, vector, preconditioner=preconditioner)
    residual, products = float(solution.residual), int(solution.steps) + rank
    if not solution.finite or not math.isfinite(residual):
        raise flat.ProductNotFinite
    if residual > tolerance and products < max_products and not curvature.psd:
        raise ValueError(
            f"`Curvature.solve`: the Hessian with damping={damping!r} is not positive definite: conjugate gradients "
            "met a direction of negative curvature. Pass a larger damping, or use kind='ggn'."
        )
    if residual > tolerance:
        warnings.warn(
            f"`Curvature.solve`: the residual is {residual:.2g} after {products} products, more than "
            f"tolerance={tolerance:g}. Pass a larger `damping` or `max_products`.", stacklevel=3,
        )  # fmt: skip
    return _times(length, solution)


def _unit(vector):
    """The vector in units of its length, and the length; a zero vector as it is.

    The norms of conjugate gradients are squares in the vector's dtype: in float32 they vanish at a length of 1e-23.
    """
    layout = flat.Layout(vector)
    b = layout.pack(vector)
    if not b.any():
        return vector, 1.0
    b, largest = flat.scaled("vector", b, "a finite vector")
    length = flat.norm(b)
    return layout.unpack(b / b.dtype.type(length)), largest * length


def _times(length, solution):
    """The `Solution` for a right-hand side so many times as long."""
    value = trees.scale(length, solution.value)
    if not all(bool(tf.reduce_all(tf.math.is_finite(a))) for a in value):
        raise ValueError(
            f"`Curvature.solve`: the solution overflows. Received: `vector` of length {length:.3g}. Pass a shorter one."
        )
    return dataclasses.replace(
        solution, value=value, iterate=lambda j: trees.scale(length, solution.iterate(j)),
        quadratic=lambda j: length**2 * tf.cast(solution.quadratic(j), tf.float64),
    )  # fmt: skip


def _check_positive(curvature, damping):
    pairs = curvature.top(1, tolerance=1e-2, most_negative=True)
    value = float(pairs.values[0])
    # a Ritz value is never below the smallest eigenvalue, and an eigenvalue lies within the residual of it
    lowest = value - float(pairs.residuals[0])
    if value < 0 and lowest + damping <= 0:
        raise ValueError(
            f"`Curvature.solve`: the Hessian is not positive definite with damping={damping!r}, to the precision of "
            f"its products: its most negative eigenvalue is {value:.3g}. Pass damping > {-1.01 * lowest:.3g}, or use "
            "kind='ggn'."
        )
