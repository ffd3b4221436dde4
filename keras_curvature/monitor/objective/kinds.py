"""The kinds of curvature matrix that can be measured, in one table."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kind:
    """A curvature matrix.

    Attributes:
        title: Its name in a heading.
        psd: Whether it is positive semi-definite.
        product: A function of a `Linearization` and a vector: the product with the matrix of one batch.
    """

    title: str
    psd: bool
    product: Callable


KINDS = {
    "hessian": Kind("Hessian", False, lambda lin, v: lin.hessian() @ v),
    "ggn": Kind("Gauss-Newton", True, lambda lin, v: lin.gauss_newton() @ v),
    "fisher": Kind("Fisher", True, lambda lin, v: lin.fisher("exact") @ v),
    "empirical_fisher": Kind("empirical Fisher", True, lambda lin, v: lin.fisher("empirical") @ v),
}
EXPECTED = f"one of {', '.join(map(repr, KINDS))}"
