"""Validate and save a plain model at the solution of `Neumann` instead of at its displaced weights."""

import keras

from keras_curvature.component import check_flag
from keras_curvature.optimizers.neumann import Neumann
from keras_curvature.training.models import CurvedMixin
from keras_curvature.training.step import unwrap
from keras_curvature.typing import Logs


class SwapNeumannWeights(keras.callbacks.Callback):
    """Swaps the solution of `Neumann`, `w - mu m`, into a plain model for validation and saving.

    While `fit` trains a plain `keras.Model` with `Neumann`, the model's weights are the displaced ones, `w`. This
    callback assigns the solution before validation, and the displaced weights afterwards, bit for bit. Another `fit`
    continues at the displaced weights. On a curved model (`keras_curvature.curved`) the weights are the solution, and
    this callback does nothing.

    Args:
        swap_on_epoch: Whether to assign the solution at `on_epoch_end` too, for later callbacks in the list such as
            `ModelCheckpoint` and `EarlyStopping(restore_best_weights=True)`, which would save the displaced weights
            otherwise. Defaults to `False`.

    Raises:
        ValueError: `swap_on_epoch` is not `True` or `False`; at the start of `fit`, if the model's optimizer is not
            `Neumann`.

    Example:

    ```python
    model.fit(x, y, validation_data=..., callbacks=[keras_curvature.callbacks.SwapNeumannWeights()])
    swap = keras_curvature.callbacks.SwapNeumannWeights(swap_on_epoch=True)
    model.fit(x, y, callbacks=[swap, keras.callbacks.ModelCheckpoint(...)])
    ```
    """

    def __init__(self, swap_on_epoch: bool = False) -> None:
        super().__init__()
        check_flag(self, "swap_on_epoch", swap_on_epoch)
        self.swap_on_epoch = swap_on_epoch
        self._displaced = None

    def _swap_in(self):
        optimizer, _ = unwrap(self.model.optimizer)
        if self._displaced is None and optimizer.built and optimizer.is_displaced:
            self._displaced = [w.numpy() for w in self.model.trainable_variables]
            optimizer.restore()

    def _swap_out(self):
        if self._displaced is not None:
            for w, value in zip(self.model.trainable_variables, self._displaced):
                w.assign(value)
            unwrap(self.model.optimizer)[0].mark_displaced()
            self._displaced = None

    def on_train_begin(self, logs: Logs = None) -> None:
        """Assign the displaced weights."""
        optimizer, _ = unwrap(self.model.optimizer)
        if not isinstance(optimizer, Neumann):
            raise ValueError(
                f"`SwapNeumannWeights` needs the optimizer `Neumann`. Received: a model compiled with "
                f"`{type(optimizer).__name__}`. Remove this callback."
            )
        self._displaced = None
        if not isinstance(self.model, CurvedMixin):
            optimizer.displace()

    def on_train_end(self, logs: Logs = None) -> None:
        """Keep the solution, which `Neumann` has assigned by now."""
        self._displaced = None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Assign the displaced weights again, if the last epoch ended with the solution."""
        self._swap_out()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Assign the solution for the callbacks that follow, if `swap_on_epoch`."""
        if self.swap_on_epoch:
            self._swap_in()

    def on_test_begin(self, logs: Logs = None) -> None:
        """Assign the solution."""
        self._swap_in()

    def on_test_end(self, logs: Logs = None) -> None:
        """Assign the displaced weights again."""
        self._swap_out()
