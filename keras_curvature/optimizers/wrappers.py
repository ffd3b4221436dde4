"""What every optimizer takes as arguments and does to the finished step: the cautious mask and decay, the hyperball."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.component import check
from keras_curvature.optimizers.cautious import agreeing, decaying
from keras_curvature.optimizers.hyperball import on_spheres
from keras_curvature.optimizers.state import SavedOptimizer
from keras_curvature.typing import Config, LearningRate, Variables, Vector

# The arguments; in this order they act.
WRAPPERS = ("cautious", "cautious_decay", "hyperball")


class WrappedOptimizer(SavedOptimizer):
    """The part of `CurvatureOptimizer` that changes steps, whatever the method."""

    def __init__(
        self, learning_rate: LearningRate, cautious: bool = False, cautious_decay: bool = False,
        hyperball: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.cautious, self.cautious_decay, self.hyperball = cautious, cautious_decay, hyperball

    @property
    def wrappers(self) -> list[str]:
        """The names of the arguments that change the step."""
        return [name for name in WRAPPERS if getattr(self, name)]

    def wrapped(self, step: Vector, gradient: Callable[[], Vector]) -> Vector:
        """The step as it is handed to Keras."""
        if self.cautious:
            step = agreeing(step, gradient())
        if self.cautious_decay and self.weight_decay:
            decays = [self.weight_decay if keras_internals.decays(self, v) else 0.0 for v in self.trained]
            step = decaying(step, trees.values(self.trained), decays)
        if self.hyperball:
            step = on_spheres(step, self.trained, tf.convert_to_tensor(self.learning_rate))
        return step

    def check_wrappers(self, steps_each_weight: bool) -> None:
        """Refuse what is neither `True` nor `False`, and where no step is handed to Keras."""
        for name in WRAPPERS:
            value = getattr(self, name)
            check(self, name, value, isinstance(value, bool), "True or False")
        if self.wrappers and steps_each_weight:
            raise ValueError(
                f"`{type(self).__name__}` steps each variable by itself, in `update_step`, so that nothing can change "
                f"its step. Received: {self.wrappers[0]}=True. Leave it out."
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
        return super().get_config() | dict.fromkeys(self.wrappers, True)
