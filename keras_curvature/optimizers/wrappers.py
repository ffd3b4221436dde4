"""What every optimizer takes as arguments and does to the finished step: cautious mask and decay, hyperball, scales."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.component import check, check_flag, is_number
from keras_curvature.optimizers.cautious import agreeing, decaying
from keras_curvature.optimizers.hyperball import on_spheres
from keras_curvature.optimizers.state import SavedOptimizer
from keras_curvature.typing import Config, LearningRate, Variables, Vector

SWITCHES = ("cautious", "cautious_decay", "hyperball")
WRAPPERS = (*SWITCHES, "scales")


class WrappedOptimizer(SavedOptimizer):
    """The part of `CurvatureOptimizer` that changes steps, whatever the method."""

    def __init__(
        self, learning_rate: LearningRate, cautious: bool = False, cautious_decay: bool = False,
        hyperball: bool = False, scales: Sequence[float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.cautious, self.cautious_decay, self.hyperball = cautious, cautious_decay, hyperball
        self.scales = scales

    @property
    def wrappers(self) -> list[str]:
        """The names of the arguments that change the step."""
        return [name for name in WRAPPERS if getattr(self, name)]

    def wrapped(self, step: Vector, gradient: Callable[[], Vector], clip: Callable[[Vector], Vector]) -> Vector:
        """The step as it is handed to Keras, which does not clip it: `clip` does, before what has a size of its own.

        Scales are learning rates, the decay has `learning_rate` itself, and the hyperball gives a step its length.
        """
        if self.cautious:
            step = agreeing(step, gradient())
        step = clip(step)
        if self.scales:
            of_each = dict(zip(map(id, keras_internals.trained_by(self)), self.scales))
            step = [trees.exactly(float(of_each[id(v)]), s.dtype) * s for s, v in zip(step, self.trained, strict=True)]
        if self.cautious_decay and self.weight_decay:
            decays = [self.weight_decay if keras_internals.decays(self, v) else 0.0 for v in self.trained]
            step = decaying(step, trees.values(self.trained), decays)
        if self.hyperball:
            step = on_spheres(step, self.trained, tf.convert_to_tensor(self.learning_rate))
        return step

    def build(self, variables: Variables) -> None:
        """Keras', with a scale for each variable."""
        if self.scales and len(self.scales) != len(variables):
            raise ValueError(
                f"`{type(self).__name__}`: `scales` must have a number for each of the {len(variables)} trainable "
                f"weights, in the order of `model.trainable_variables`. Received: {len(self.scales)} numbers."
            )
        super().build(variables)

    def check_wrappers(self, steps_each_weight: bool) -> None:
        """Refuse values of another kind, and where no step is handed to Keras."""
        for name in SWITCHES:
            value = getattr(self, name)
            check_flag(self, name, value)
        scales = self.scales
        numbers = isinstance(scales, (list, tuple)) and len(scales) > 0 and all(is_number(c) and c >= 0 for c in scales)
        expected = "a list of numbers >= 0 (`float` or `int`), such as `mup_scales(...).rates`, or None"
        check(self, "scales", scales, scales is None or numbers, expected)
        if self.wrappers and steps_each_weight:
            raise ValueError(
                f"`{type(self).__name__}` steps each variable by itself, in `update_step`, so that nothing can change "
                f"its step. Received: {self.wrappers[0]}={getattr(self, self.wrappers[0])}. Leave it out."
            )
        if self.hyperball and self.scales:
            raise ValueError(
                f"`{type(self).__name__}`: `hyperball` gives each kernel's step its length, which `scales` would "
                "change. Received: hyperball=True and `scales`. Leave one of them out."
            )
        if self.hyperball and self.weight_decay:
            raise ValueError(
                f"`{type(self).__name__}`: `hyperball` holds the norms that a weight decay would shrink. Received: "
                f"hyperball=True, weight_decay={self.weight_decay}. Leave one of them out."
            )

    def _apply_weight_decay(self, variables: Variables) -> None:
        """Keras' decay, if it is not in the step."""
        if not self.cautious_decay:
            super()._apply_weight_decay(variables)

    def get_config(self) -> Config:
        """The config, with these arguments where they are set, so that earlier versions read the other files."""
        return super().get_config() | {name: getattr(self, name) for name in self.wrappers}
