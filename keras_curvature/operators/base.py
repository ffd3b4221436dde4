"""Linear operators on weight space. An operator multiplies; solvers solve.

    A @ v        the product with a vector (a list of tensors)
    A + B        the sum of two operators
    s * A        the multiple by a number or a scalar tensor

`psd` states whether the map is symmetric positive semi-definite. The creator of an operator sets it; nothing computes
it. A solver that needs it (conjugate gradients) refuses other operators. A damped curvature is
`linearization.gauss_newton() + damping * Identity()`.
"""

import dataclasses
import numbers
from collections.abc import Callable

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.typing import Scalar, Vector


class LinearOperator:
    """A symmetric map `v -> A v` on lists of tensors. A subclass writes `multiply`.

    Attributes:
        psd: Whether `v'Av >= 0` for every `v`. Defaults to `False`.

    Example:

    ```python
    from keras_curvature import ConjugateGradient, Identity, Linearization

    lin = Linearization(model, x, y)
    A = lin.gauss_newton() + 1e-2 * Identity()
    newton = ConjugateGradient().solve(A, [-g for g in lin.gradient]).value
    ```
    """

    psd = False

    def multiply(self, vector: Vector) -> Vector:
        """`A v`, a vector.

        Args:
            vector: A list of tensors.

        Returns:
            A list of tensors of the same shapes.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must implement `multiply(vector)`.")

    def __matmul__(self, vector: Vector) -> Vector:
        return self.multiply(vector)

    def __add__(self, other: "LinearOperator") -> "Sum":
        _require_operator(other)
        return Sum(self, other)

    def __radd__(self, other: "LinearOperator") -> "Sum":
        _require_operator(other)
        return Sum(other, self)

    def __rmul__(self, scalar: Scalar) -> "Scaled":
        return Scaled(scalar, self)

    __mul__ = __rmul__
    __array_ufunc__ = None  # makes `np.float32(2) * A` an operator, not an array of operators

    def quadratic_form(self, u: Vector, v: Vector) -> tf.Tensor:
        """`u' A v`, a scalar."""
        product = self @ v
        trees.check("u", u, v)
        return trees.dot(u, product)


@dataclasses.dataclass(frozen=True)
class Function(LinearOperator):
    """An operator given by its product, such as a Hessian.

    Args:
        product: A function from a vector to a vector, `v -> A v`.
        psd: Whether the operator is symmetric positive semi-definite. Defaults to `False`.

    Example: `Function(lambda v: [2.0 * a for a in v], psd=True)`
    """

    product: Callable[[Vector], Vector]
    psd: bool = False

    def multiply(self, vector: Vector) -> Vector:
        return self.product(vector)


@dataclasses.dataclass(frozen=True)
class Identity(LinearOperator):
    """`v -> v`."""

    psd = True

    def multiply(self, vector: Vector) -> Vector:
        return vector


@dataclasses.dataclass(frozen=True)
class Sum(LinearOperator):
    """`v -> A v + B v`, made by `A + B`. It is `psd` if both are."""

    left: LinearOperator
    right: LinearOperator

    @property
    def psd(self) -> bool:  # type: ignore[override]
        return self.left.psd and self.right.psd

    def multiply(self, vector: Vector) -> Vector:
        return trees.add(self.left @ vector, self.right @ vector)


@dataclasses.dataclass(frozen=True)
class Scaled(LinearOperator):
    """`v -> s A v`, made by `s * A`.

    It is `psd` if `A` is and `s` is known to be non-negative. The value of a tensor in a graph is not known: pass
    `nonnegative=True` for it.

    Args:
        scalar: `s`, a number or a scalar tensor.
        operator: `A`.
        nonnegative: Whether `s >= 0`; `None`: read from the value, and false if it is not known. Defaults to `None`.
    """

    scalar: Scalar
    operator: LinearOperator
    nonnegative: bool | None = None

    def __post_init__(self):
        _require_scalar(self.scalar)

    @property
    def psd(self) -> bool:  # type: ignore[override]
        known = _is_nonnegative(self.scalar) if self.nonnegative is None else self.nonnegative
        return self.operator.psd and known

    def multiply(self, vector: Vector) -> Vector:
        product = vector if isinstance(self.operator, Identity) else self.operator @ vector
        return trees.scale(self.scalar, product)


def _require_operator(other):
    if not isinstance(other, LinearOperator):
        raise TypeError(
            f"An operator can be added only to another operator. Received: {_described(other)}. To add a multiple of "
            "the identity, such as a damping, write `A + 0.1 * keras_curvature.Identity()`."
        )


def _require_scalar(scalar):
    """Raise a `TypeError` unless `scalar` is a number or a scalar tensor; a tensor of unknown rank passes."""
    is_number = isinstance(scalar, numbers.Real) or hasattr(scalar, "dtype")
    if not is_number or tf.TensorShape(getattr(scalar, "shape", ())).rank not in (0, None):
        raise TypeError(
            f"An operator can be multiplied only by a number or a scalar tensor. Received: {_described(scalar)}. For "
            "the product with a vector write `A @ vector`; for a factor per weight, `operators.Diagonal(entries)`."
        )


def _described(value):
    if isinstance(value, numbers.Real):
        return repr(value)
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


def _is_nonnegative(scalar):
    """Whether a number or tensor is known to be at least 0; false for a graph tensor of unknown value."""
    if hasattr(scalar, "dtype"):
        scalar = tf.get_static_value(tf.convert_to_tensor(scalar))
    return scalar is not None and bool(scalar >= 0)


def dense(operator: LinearOperator, like: Vector) -> tf.Tensor:
    """The matrix of an operator, `(n, n)`, from `n` products; for tests and small models.

    Args:
        operator: A `LinearOperator`.
        like: A vector, for its shapes and dtypes; `n` is its number of entries.
    """
    sizes = [int(a.shape.num_elements()) for a in like]
    columns = []
    for unit in tf.unstack(tf.eye(sum(sizes), dtype=like[0].dtype)):
        vector = [tf.reshape(part, a.shape) for part, a in zip(tf.split(unit, sizes), like)]
        columns.append(tf.concat([tf.reshape(a, [-1]) for a in operator @ vector], 0))
    return tf.stack(columns, axis=1)
