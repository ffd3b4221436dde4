"""The substitute for a `Linearization` on a plain `keras.Model`."""

from collections.abc import Sequence
from typing import Any

from keras_curvature import trees
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.typing import Variables, Vector

KEPT = ("batch", "examples")  # what every `Linearization` keeps, and its class does not show


class Gradients:
    """The gradient that a plain `keras.Model` passes to its optimizer, summed over the replicas.

    Args:
        asked_by: Name of the optimizer, for the message.
        gradient: The gradient, a vector.
        variables: The variables that it belongs to.
        reached: Whether the loss depends on each of them; by default on all.

    Attributes:
        model, loss_scale: `None`: gradients do not tell whose they are, and Keras has taken its scale off.
    """

    model = loss_scale = None

    def __init__(
        self, asked_by: str, gradient: Vector, variables: Variables, reached: Sequence[bool] | None = None
    ) -> None:  # fmt: skip
        self._asked_by, self.gradient, self.variables = asked_by, gradient, list(variables)
        self.reached = tuple(True for _ in variables) if reached is None else tuple(reached)

    @property
    def weights(self) -> Vector:
        """The current weights."""
        return trees.values(self.variables)

    @property
    def needs(self) -> Any:
        """What a function of a `Linearization` looks at first; here there is none."""
        raise ValueError(needs_a_curved_model(self._asked_by, "needs more than the gradient of the loss"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not (hasattr(Linearization, name) or name in KEPT):
            raise AttributeError(f"`Gradients` has no attribute {name!r}")
        raise ValueError(needs_a_curved_model(self._asked_by, f"needs more than gradients (`Linearization.{name}`)"))


def needs_a_curved_model(optimizer, wants):
    """The message where an optimizer gets gradients only; `wants` says what it needs beyond them."""
    return (
        f"`{optimizer}` {wants}, but a plain `keras.Model` passes its optimizer gradients only. Curve the model before "
        "`compile`:\n\n"
        "    model = keras_curvature.curved(model)\n\n"
        "In a training loop of your own, take the step on the batch and not on gradients:\n\n"
        "    linearization = keras_curvature.Linearization(model, x, y)\n"
        "    optimizer.step(linearization)\n"
        "    linearization.commit()\n\n"
        "A model with its own `train_step` cannot be curved: compute its loss in `compute_loss` instead."
    )
