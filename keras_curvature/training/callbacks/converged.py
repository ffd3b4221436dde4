"""Stop `fit` when a method with a line search has converged, and say why."""

import keras

from keras_curvature.component import check_choice, check_count, check_number
from keras_curvature.steps.search import ENDS
from keras_curvature.training.first_call import say
from keras_curvature.typing import Logs


class Converged(keras.callbacks.Callback):
    """Stops `fit` at the end of an epoch when there is nothing left to gain, for training on the whole set as a batch.

    It stops when the largest entry of the gradient is at most `gradient`; when the loss changed by at most `loss`
    times its size in each of `patience` epochs in a row; when no step of `patience` epochs in a row found a lower loss
    (at the limit of rounding, or where the loss is flat); and when the loss of every batch of an epoch was not finite.

    Args:
        gradient: Largest entry of the gradient at the end of a step, at least 0; `None`: not looked at. Defaults to
            `1e-7` (PyTorch's L-BFGS); in float32 about `1e-5` can be reached.
        loss: Relative change of the loss, at least 0; `None`: not looked at. Defaults to `None`.
        patience: Number of epochs in a row. Defaults to `2`.
        verbose: 1: print the reason; 0: only store it. Defaults to `1`.

    Attributes:
        reason: Why `fit` was stopped, in words; `None` while it was not.

    Raises:
        ValueError: At the end of the first epoch: `gradient` is given, and the optimizer does not report
            `gradient_max`.

    Example: `model.fit(x, y, batch_size=len(x), epochs=5000, callbacks=[kc.callbacks.Converged(gradient=1e-8)])`
    """

    def __init__(
        self, gradient: float | None = 1e-7, loss: float | None = None, patience: int = 2, verbose: int = 1
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("gradient", gradient), ("loss", loss)):
            check_number(self, name, value, low=0, or_none=True)
        check_count(self, "patience", patience)
        check_choice(self, "verbose", verbose, (0, 1))
        self.gradient, self.loss, self.patience, self.verbose = gradient, loss, patience, verbose
        self.reason: str | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        """Begin anew."""
        self.reason, self._last, self._alike, self._stuck = None, None, 0, 0

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Look at the logs of the epoch."""
        logs = logs or {}
        if self.gradient is not None and "gradient_max" not in logs:
            raise ValueError(
                f"`Converged`: the optimizer does not report `gradient_max`. Received: gradient={self.gradient!r}. "
                "Train a curved model (`keras_curvature.curved(model)`) with `LBFGS` or `BFGS`, or pass "
                "`gradient=None, loss=1e-9`."
            )
        self.reason = self._reason(logs)
        if self.reason is not None:
            self.model.stop_training = True
            if self.verbose:
                say(f"Epoch {epoch + 1}: converged, because {self.reason}.")

    def _reason(self, logs):
        loss, last = logs["loss"], self._last
        self._last = loss
        alike = last is not None and self.loss is not None and abs(loss - last) <= self.loss * abs(last)
        stuck = logs.get("step_norm") == 0.0 and logs.get("skipped_steps") == 0.0
        self._alike, self._stuck = (self._alike + 1) * alike, (self._stuck + 1) * stuck
        if loss != loss:  # our train step counts only finite losses
            return "the loss of no batch is finite"
        if self.gradient is not None and logs["gradient_max"] <= self.gradient:
            return f"the largest entry of the gradient is {logs['gradient_max']:.2g}, at most {self.gradient:g}"
        if self._alike >= self.patience:
            return f"the loss changed by less than {self.loss:g} of its size in {self._alike} epochs in a row"
        if self._stuck >= self.patience:
            end = ENDS[int(logs["search_end"])] if "search_end" in logs else "no step was accepted"
            return f"no lower loss was found in {self._stuck} epochs in a row ({end})"
        return None
