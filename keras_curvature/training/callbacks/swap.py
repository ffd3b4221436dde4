"""The answer of `Neumann` in the weights of a plain model, for validation and saving."""

import keras

from keras_curvature.optimizers.neumann import Neumann
from keras_curvature.training.models import CurvedMixin
from keras_curvature.training.step import unwrap


class SwapNeumannWeights(keras.callbacks.Callback):
    """Puts the answer of `Neumann`, `w - mu m`, into a plain model's weights for validation and saving.

    While `fit` runs on a plain `keras.Model`, the stored weights are the displaced ones. This callback puts the answer
    into the weights before validation, and the displaced weights back afterwards, bit for bit. Another `fit` begins at
    the displaced weights, where the last one stopped. On a curved model (`keras_curvature.curved`) the stored weights
    are the answer, and this callback does nothing.

    Args:
        swap_on_epoch: Whether to put the answer into the weights at `on_epoch_end` too, for later callbacks in the
            list such as `ModelCheckpoint` and `EarlyStopping(restore_best_weights=True)`: without it they save
            displaced weights. Defaults to `False`.

    Raises:
        ValueError: At the start of `fit`, if the model's optimizer is not `Neumann`.

    Example:

    ```python
    model.fit(x, y, validation_data=..., callbacks=[keras_curvature.callbacks.SwapNeumannWeights()])
    model.fit(x, y, callbacks=[SwapNeumannWeights(swap_on_epoch=True), keras.callbacks.ModelCheckpoint(...)])
    ```
    """

    def __init__(self, swap_on_epoch=False):
        super().__init__()
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

    def on_train_begin(self, logs=None):
        """Put the displaced weights into the model."""
        optimizer, _ = unwrap(self.model.optimizer)
        if not isinstance(optimizer, Neumann):
            raise ValueError(
                f"`SwapNeumannWeights` goes with `Neumann`. Received a model compiled with: {type(optimizer).__name__}"
            )
        self._displaced = None
        if not isinstance(self.model, CurvedMixin):
            optimizer.displace()

    def on_train_end(self, logs=None):
        """Keep the answer: Keras has put it into the weights by now."""
        self._displaced = None

    def on_epoch_begin(self, epoch, logs=None):
        """Put the displaced weights back, if the end of the last epoch replaced them."""
        self._swap_out()

    def on_epoch_end(self, epoch, logs=None):
        """Put the answer into the weights, for the callbacks that follow."""
        if self.swap_on_epoch:
            self._swap_in()

    def on_test_begin(self, logs=None):
        """Put the answer into the weights."""
        self._swap_in()

    def on_test_end(self, logs=None):
        """Put the displaced weights back."""
        self._swap_out()
