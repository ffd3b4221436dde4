"""A number estimated from random vectors, with its error."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An unbiased estimate of a number.

    Attributes:
        value: The estimate, a float.
        stderr: Its standard error, a float; 0 where the value is exact.
        products: Number of products that it took.
    """

    value: float
    stderr: float
    products: int

    def __str__(self):
        return f"{self.value:.4g} ± {self.stderr:.2g}"
