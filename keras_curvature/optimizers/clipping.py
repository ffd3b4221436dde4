"""The limit `learning_rate^2 d'g <= bound` on a direction `d` for the gradient `g`, as an argument of a method.

With `d = F^-1 g` and `F` the Fisher matrix, `learning_rate^2 d'g` is about twice the divergence of the predictions
before and after the step; for other matrices, the square of the step in the norm that the method divides by. It bounds
the first steps, for which matrices are of few examples, whatever the network and the batch.
"""

from typing import Any

from keras_curvature import trees
from keras_curvature.component import check_number
from keras_curvature.steps.trust_region import kl_clip
from keras_curvature.typing import Vector


def set_clip(optimizer: Any, name: str, bound: float | None) -> None:
    """Keep the argument `name`, a positive number or `None` for no limit; then there is no report of this name."""
    setattr(optimizer, name, bound)
    check_number(optimizer, name, bound, low=0, open_low=True, or_none=True)
    if bound is None:
        optimizer.reports = {report: how for report, how in optimizer.reports.items() if report != name}


def clipped(optimizer: Any, name: str, direction: Vector, gradient: Vector) -> Vector:
    """`min(1, sqrt(bound / (learning_rate^2 d'g))) d`; reports the factor."""
    bound = getattr(optimizer, name)
    if bound is None:
        optimizer.report(**{name: 1.0})
        return direction
    nu = kl_clip(bound, optimizer.learning_rate, trees.dot(direction, gradient))
    optimizer.report(**{name: nu})
    return trees.scale(nu, direction)


def clip_note(optimizer: Any, name: str) -> str | None:
    """What `stability` says of the limit."""
    if getattr(optimizer, name) is None:
        return None
    return f"Where `{name}` makes a step shorter, the gauge is an upper bound."
