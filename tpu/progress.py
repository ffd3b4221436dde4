"""What goes with a training of many short steps: lines, TensorBoard, checkpoints, and logs that stay on the device."""

import time

import keras

from keras_curvature import keras_internals
from keras_curvature.callbacks import Checkpoint
from keras_curvature.training.callbacks.checkpoint import Position


class Lazily(keras.callbacks.CallbackList):
    """Keras' list of callbacks, which hands on the logs of a batch as they are, tensors on the device.

    Keras turns them into numbers after every execution, and the host waits for the step. Here a callback does so where
    it reads them.
    """

    def on_train_batch_end(self, batch, logs=None):
        """Call the callbacks."""
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        """Call the callbacks."""
        for callback in self.callbacks:
            callback.on_test_batch_end(batch, logs)


class Progress(keras.callbacks.Callback):
    """Images per second into the logs, and a line now and then.

    Args:
        batch_size: Images in a step.
        steps_per_epoch: Steps.
        every: Steps between two lines.
        say: Called with a line.
        chips: What the images per second are also divided by. Defaults to `1`.
    """

    def __init__(self, batch_size, steps_per_epoch, every, say, chips=1):
        super().__init__()
        self.batch_size, self.steps_per_epoch, self.every, self.say = batch_size, steps_per_epoch, every, say
        self.chips = chips

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.began, self.done = epoch, None, 0

    def on_train_batch_end(self, batch, logs=None):
        before, self.done = self.done, keras_internals.last_step(batch, self.model) + 1
        if self.began is None:  # the first execution traces the graph
            before = self.done - self.model.steps_per_execution
            self.began = time.perf_counter(), self.done
        step, last = (self.epoch * self.steps_per_epoch + done for done in (self.done, before))
        if step // self.every > last // self.every:
            self.say(f"step {step:>7}  epoch {step / self.steps_per_epoch:7.2f}  {shown(logs)}{self.speed()}")

    def images_per_second(self):
        began, first = self.began
        return self.batch_size * (self.done - first) / (time.perf_counter() - began)

    def speed(self):
        if self.done == self.began[1]:
            return ""
        speed = self.images_per_second()
        return f"  images/s {speed:.0f}" + (f" ({speed / self.chips:.0f} per replica)" if self.chips > 1 else "")

    def on_test_begin(self, logs=None):
        if getattr(self, "began", None) is not None:
            self.trained = self.images_per_second()

    def on_epoch_end(self, epoch, logs=None):
        if self.began is not None:
            logs["images_per_second"] = self.trained if "val_loss" in logs else self.images_per_second()
            logs["images_per_second_per_replica"] = logs["images_per_second"] / self.chips
        self.say(f"epoch {epoch + 1:>4} of {self.params['epochs']}  {shown(logs)}")


def shown(logs):
    """The numbers worth a line."""
    names = ("loss", "top_1", "top_5", "mu", "damping", "skipped_steps", "val_top_1", "val_top_5", "images_per_second")
    return "  ".join(f"{name} {float(logs[name]):.4g}" for name in names if name in logs)


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras', whose axis counts steps, also where several run at once, and goes on where the run does."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._global_train_batch = int(self.model.optimizer.iterations.numpy())
        if self._start_batch:  # the steps of this start
            self._start_batch, self._stop_batch = (
                self._global_train_batch + whole(n, self.model.steps_per_execution)
                for n in (self._start_batch, self._stop_batch)
            )

    def on_train_batch_begin(self, batch, logs=None):
        self._global_train_batch += self.model.steps_per_execution - 1
        super().on_train_batch_begin(batch, logs)


def whole(steps, at_once):
    """The next multiple of `at_once`."""
    return -(-steps // at_once) * at_once


class Checkpoints(Checkpoint):
    """The package's, which does not save at the end of every epoch, saves by the clock, and stops during a validation.

    At a batch of 32000 an epoch has 40 steps: a checkpoint after each of them would take a good part of the time.

    Args:
        directory: The folder.
        every: Steps between two checkpoints; `None`: at the end of each epoch.
        minutes: Minutes between two checkpoints, in addition. Defaults to `None`.
    """

    def __init__(self, directory, every=None, minutes=None):
        super().__init__(directory, every=every, skip_batches=False)
        self.minutes = minutes

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._at, self._last = time.monotonic(), self._steps

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        late = self.minutes is not None and time.monotonic() - self._at >= 60 * self.minutes
        if late and self._step != self.params.get("steps"):
            self._save(Position(self._epoch, self._step))

    def on_test_batch_begin(self, batch, logs=None):
        """Save and stop if SIGTERM has arrived; the validation is left out."""
        if not self._several and self._sigterm.received:
            self._save(Position(self._epoch + 1, 0))
            self._stop()

    def on_epoch_end(self, epoch, logs=None):
        """Save where a checkpoint is due, and at the end."""
        if self.minutes is None and self.every is None:
            due = True
        else:
            by_steps = self.every is not None and self._steps // self.every > self._last // self.every
            due = by_steps or (self.minutes is not None and time.monotonic() - self._at >= 60 * self.minutes)
        if due or epoch + 1 == self.params["epochs"]:
            super().on_epoch_end(epoch, logs)

    def _save(self, position):
        super()._save(position)
        self._at, self._last = time.monotonic(), self._steps
