"""Where the answer of `Neumann` is, for whoever looks at a plain model."""

import keras

from keras_curvature.optimizers.neumann import Neumann
from keras_curvature.training.models import CurvedMixin
from keras_curvature.training.step import unwrap


class SwapNeumannWeights(keras.callbacks.Callback):
    """Puts the answer of `Neumann`, `w - mu m`, into a plain model's weights whenever somebody looks at them.

    While `fit` runs on a plain `keras.Model` the stored weights are the displaced ones. This callback swaps the answer
    in before validation and takes it out again after it, bit for bit; and a `fit` that follows another begins at the
    displaced weights, where the last one stopped. On a curved model (`keras_curvature.curved`) there is nothing to
    swap and it does nothing.

    Args:
        swap_on_epoch: Whether to have the answer in the weights at `on_epoch_end` too, for callbacks such as
            `ModelCheckpoint` and `EarlyStopping(restore_best_weights=True)` that come after this one: without it they
            keep displaced weights. Defaults to `False`.

    Raises:
        ValueError: At the start of `fit`, where the model's optimizer is not `Neumann`.

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
        """Begin at the displaced weights."""
        optimizer, _ = unwrap(self.model.optimizer)
        if not isinstance(optimizer, Neumann):
            raise ValueError(
                f"`SwapNeumannWeights` goes with `Neumann`. Received a model compiled with: {type(optimizer).__name__}"
            )
        self._displaced = None
        if not isinstance(self.model, CurvedMixin):
            optimizer.displace()

    def on_train_end(self, logs=None):
        """Keras has finalized the weights by now."""
        self._displaced = None

    def on_epoch_begin(self, epoch, logs=None):
        """Back to the displaced weights, where the epoch's end swapped them out."""
        self._swap_out()

    def on_epoch_end(self, epoch, logs=None):
        """The answer for the callbacks that come after this one."""
        if self.swap_on_epoch:
            self._swap_in()

    def on_test_begin(self, logs=None):
        """The answer for validation."""
        self._swap_in()

    def on_test_end(self, logs=None):
        """Back to training."""
        self._swap_out()
