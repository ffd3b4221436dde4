"""Checkpoints from which an interrupted run continues bit for bit."""

import os
import shutil
import tempfile
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.component import check, check_count, check_flag
from keras_curvature.training.callbacks.chief import is_chief
from keras_curvature.training.callbacks.fits import Fit
from keras_curvature.training.callbacks.shares import Shares
from keras_curvature.training.callbacks.sigterm import Sigterm, Terminated
from keras_curvature.training.callbacks.state import About, described, refuse_another, state_of
from keras_curvature.typing import Logs

# With several processes, SIGTERM to one of them stops all. They check for it together every so many steps.
AGREE_EVERY = 10


class Position(NamedTuple):
    """The position of a run: epoch `epoch`, counted from 0, of which `step` steps are done."""

    epoch: int
    step: int


class Checkpoint(keras.callbacks.Callback):
    """Saves the complete state of training, and continues an interrupted run bit for bit.

    The state consists of weights, batch statistics, the seeds of random layers, the optimizer's state and loss scale,
    the epoch's metrics and reports so far, and the position in the epoch. It is saved at the end of every epoch, every
    `every` steps, and on SIGTERM. To continue a run, start the same program again: if `directory` has checkpoints,
    `fit` continues from the newest one, also inside an epoch. A checkpoint is written completely or not at all: if the
    process is killed while it writes, the previous checkpoint remains.

    On SIGTERM `fit` finishes the step, saves, and raises `Terminated`, which ends the process with the code 143 unless
    it is caught. After SIGTERM on the last step of an epoch, validation runs first. A second SIGTERM has its usual
    effect, and so has SIGTERM after `fit`, even if `fit` failed. The state of other callbacks is not saved, such as the
    patience of `EarlyStopping`.

    The order of the data is up to the caller: `shuffle=True` of `fit` draws a new order in every process. Pass batches
    in the same order in every epoch (or `shuffle=False`), or create the data from `checkpoint.position`:

    * a stream that depends on the epoch, beginning with epoch `checkpoint.position.epoch`;
    * with `skip_batches=False`, a stream that begins exactly at `checkpoint.position`, which need not decode the
      skipped examples.

    Under `MirroredStrategy` and `MultiWorkerMirroredStrategy` every process takes part in saving, because variables
    with a value per replica can only be read by all processes together; only the chief keeps files. All processes must
    see the same `directory`. A run may continue with another number of replicas. All replicas then begin with the first
    replica's batch statistics, unless these are synchronized.

    Args:
        directory: The folder for the checkpoints of this run, a local path or `gs://...`. Created if it does not exist.
        every: Steps between two checkpoints, in addition to those at the end of each epoch; `None`: only at the end of
            each epoch. Defaults to `None`.
        keep: Number of newest checkpoints to keep. Defaults to `3`.
        on_signal: Whether to handle SIGTERM as above, which works only in the main thread. Defaults to `True`.
        skip_batches: Whether the data begin with the interrupted epoch, so that `fit` draws and drops its batches up to
            the position; `False`: the data begin at the position. Defaults to `True`.

    Raises:
        ValueError: At the start of `fit`, if the newest checkpoint belongs to another model or optimizer, has other
            metrics, or is inside an epoch of another length. Nothing is overwritten then.

    Put this callback first in the list, so that the other callbacks see the restored state.

    Example:

    ```python
    checkpoint = keras_curvature.callbacks.Checkpoint("run", every=500)
    model.fit(dataset, epochs=90, callbacks=[checkpoint])
    ```
    """

    def __init__(
        self, directory: str | os.PathLike, every: int | None = None, keep: int = 3, on_signal: bool = True,
        skip_batches: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check(self, "directory", directory, bool(directory) and isinstance(directory, (str, os.PathLike)), "a path")
        check_count(self, "keep", keep)
        check_count(self, "every", every, or_none=True)
        check_flag(self, "on_signal", on_signal)
        check_flag(self, "skip_batches", skip_batches)
        self.directory, self.every, self.keep = os.fspath(directory), every, keep
        self.on_signal, self.skip_batches = on_signal, skip_batches

    @property
    def position(self) -> Position:
        """The `Position` of the newest checkpoint, from which `fit` continues; `(0, 0)` without a checkpoint."""
        about = self._newest()
        return Position(*about["position"]) if about else Position(0, 0)

    def _newest(self):
        """The description of the newest checkpoint and its `path`; `None` without a checkpoint."""
        path = tf.train.latest_checkpoint(self.directory)
        return None if path is None else {**About.read(path), "path": path}

    # The start of a run.

    def on_train_begin(self, logs: Logs = None) -> None:
        """Continue from the newest checkpoint."""
        self._fit, self._sigterm = Fit.of(self.model), Sigterm()
        self._saved, self._looked_around, self._shares = None, 0, None
        self._strategy, self._resumed = self.model.distribute_strategy, self._newest()
        self._about, self._epoch, self._step, self._steps = About(), 0, 0, 0
        self._several = replicas.of_several_workers(self._strategy)
        if self._fit is not None:
            self._fit.at_end(self._let_go)
        if self._resumed is not None:
            self._steps = self._looked_around = self._resumed["steps"]
        self._check_that_workers_agree()
        if self._resumed is not None:
            self._refuse_another_length()
            keras_internals.begin_at_epoch(self.model, self._resumed["position"][0])
            if self.model.built:
                self._restore(metrics=False)
        if self.on_signal:
            self._sigterm.listen()

    def _let_go(self):
        """Clean up, also if `fit` failed."""
        keras_internals.begin_at_epoch(self.model, None)  # otherwise another `fit` would begin there
        self._sigterm.stop()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Skip the steps that are done of the epoch in which the run continues."""
        keras_internals.begin_at_epoch(self.model, None)
        self._epoch, self._step = epoch, 0
        if self._resumed is None:
            return
        begins, self._step = self._resumed["position"]
        if begins != epoch:
            raise ValueError(
                f"`Checkpoint`: '{self._resumed['path']}' continues in epoch {begins}. Received: `fit` begins with "
                f"epoch {epoch}. Do not pass `initial_epoch` to `fit`; the checkpoint sets it."
            )
        if self._fit is None:
            raise ValueError(
                f"`Checkpoint`: only `fit` can continue from '{self._resumed['path']}'. Received: a loop that calls "
                "the callback itself. Use `tf.train.Checkpoint` in such a loop."
            )
        self._fit.begin_epoch_at(self._step, self.skip_batches, self._restore_all)

    def _restore_all(self, epoch_iterator):
        """Restore the state before the first batch, when the model and its metrics can be built."""
        if not self.model.built or self._step:
            with self._strategy.scope():
                keras_internals.build(self.model, keras_internals.batch_spec(epoch_iterator))
            self._restore(metrics=self._step > 0)
        self._resumed = None

    def _refuse_another_length(self):
        """Raise a `ValueError` if the position is inside an epoch of another length."""
        (epoch, step), length = self._resumed["position"], self.params.get("steps")
        if step and None not in (length, self._resumed["length"]) and length != self._resumed["length"]:
            raise ValueError(
                f"`Checkpoint`: '{self._resumed['path']}' was saved after {step} of the {self._resumed['length']} "
                f"steps of epoch {epoch}. Received: epochs of {length} steps. Use the batch size and the data that it "
                "was saved with, or start a new run in another `directory`."
            )

    def _check_that_workers_agree(self):
        """Raise a `ValueError` if the processes found different checkpoints."""
        if self._several and self._everywhere(self._steps) != self._steps:
            raise ValueError(
                f"`Checkpoint`: this worker found a checkpoint after {self._steps} steps in '{self.directory}', and "
                "another worker found none or another one. All workers must see the same `directory`."
            )

    def _everywhere(self, number):
        """The mean of a number over the processes."""
        with self._strategy.scope():
            return float(_total(tf.constant(number, tf.float64))) / replicas.count()

    # The state.

    def _checkpoint(self, groups, rows=None):
        parts = {name: [v.value for v in group] for name, group in groups.items()}
        if rows is not None:
            parts["shares"] = tf.Variable(rows)
        return tf.train.Checkpoint(about=self._about, **parts)

    def _restore(self, metrics):
        """Restore the variables from the newest checkpoint, after checking that it belongs to them."""
        groups, path = state_of(self.model, metrics), self._resumed["path"]
        refuse_another(path, self._resumed["state"], described(groups, self.model.optimizer))
        self._checkpoint(groups).restore(path).assert_existing_objects_matched().expect_partial()
        own = self._own_shares()
        if own.variables and self._resumed["replicas"] == self._strategy.num_replicas_in_sync:
            own.write(tf.train.load_checkpoint(path).get_tensor("shares/.ATTRIBUTES/VARIABLE_VALUE"))

    def _own_shares(self):
        """The `Shares`, created when the model is built."""
        self._shares = self._shares or Shares(self.model, self._strategy)
        return self._shares

    # Saving.

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Save and stop if SIGTERM has arrived; here all callbacks have seen the last step."""
        if self._asked_to_stop():
            self._save(Position(self._epoch, self._step))
            self._stop()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Save every `every` steps."""
        done = keras_internals.last_step(batch, self.model) + 1
        done = min(done, self.params.get("steps") or done)  # Keras overshoots with `steps_per_execution`
        before, self._steps, self._step = self._steps, self._steps + done - self._step, done
        due = self.every is not None and self._steps // self.every > before // self.every
        if due and self._step != self.params.get("steps"):  # the end of the epoch saves
            self._save(Position(self._epoch, self._step))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Save, with the beginning of the next epoch as position."""
        self._save(Position(epoch + 1, 0))

    def on_train_end(self, logs: Logs = None) -> None:
        """Stop handling SIGTERM."""
        self._let_go()
        if self._asked_to_stop(now=True):
            self._stop()

    def _save(self, position):
        if self._saved == position:
            return
        self._saved = position
        groups = state_of(self.model, metrics=True)
        self._about.content = {
            "position": position, "steps": self._steps, "length": self.params.get("steps"),
            "replicas": self._strategy.num_replicas_in_sync, "state": described(groups, self.model.optimizer),
        }  # fmt: skip
        own = self._own_shares()
        checkpoint = self._checkpoint(groups, own.read() if own.variables else None)
        if is_chief(self._strategy):
            manager = tf.train.CheckpointManager(checkpoint, self.directory, max_to_keep=self.keep)
            manager.save(checkpoint_number=self._steps)
        else:  # reading the variables takes all processes; the files are not needed
            folder = tempfile.mkdtemp()
            try:
                checkpoint.write(os.path.join(folder, "part"))
            finally:
                shutil.rmtree(folder)

    # Stopping.

    def _asked_to_stop(self, now=False):
        """Whether SIGTERM has arrived in any process; all processes return the same at the same step."""
        if not self._several:
            return self._sigterm.received
        due = self._steps >= self._looked_around + AGREE_EVERY
        if not self.on_signal or not (due or now):
            return False
        self._looked_around = self._steps
        return self._everywhere(float(self._sigterm.received)) > 0

    def _stop(self):
        self._let_go()
        raise Terminated(f"`fit` was stopped by SIGTERM after {self._steps} steps. The state is in '{self.directory}'.")


@tf.function
def _total(number):
    return replicas.total(tf.identity, number)
