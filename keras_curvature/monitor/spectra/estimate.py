"""A number that was estimated from random vectors, with its error."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number that random vectors estimate.

    Attributes:
        value: A float; its expectation is the number.
        stderr: Its standard error, a float.
        products: How many products it took.
    """

    value: float
    stderr: float
    products: int

    def __str__(self):
        return f"{self.value:.4g} ± {self.stderr:.2g}"
