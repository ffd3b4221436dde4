"""A run that can be killed at any moment and goes on as if it had not been.

Keras' `fit` begins at an epoch. To begin *inside* one, two things are needed that it does not offer: an epoch whose
first steps are left out, and the metrics of the steps that were taken already. Both are had at one place, the
generator of an epoch's steps (`_first_steps_left_out`), a private name of Keras 3.15.
"""

import json
import os
import re
import shutil
import signal
import tempfile
import threading
from typing import NamedTuple

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator

from keras_curvature import keras_internals, replicas
from keras_curvature.component import check, check_count
from keras_curvature.training.callbacks.chief import is_chief
from keras_curvature.training.callbacks.shares import Shares
from keras_curvature.training.reports import reports_of

# In several processes a signal to one of them stops all. So many steps are between two looks around.
AGREE_EVERY = 10


class Position(NamedTuple):
    """Where a run stands: `step` steps of epoch `epoch` are done, both counted from zero."""

    epoch: int
    step: int


class Terminated(SystemExit):
    """`fit` ended on SIGTERM, after saving. Not caught, it ends the process with the code of SIGTERM, 143."""

    def __init__(self, message):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self):
        return self.message


class _About(tf.train.experimental.PythonState):
    """What a checkpoint says of itself, as JSON beside the variables, readable without a model."""

    def __init__(self):
        self.content = {}

    def serialize(self):
        return json.dumps(self.content)

    def deserialize(self, string):
        self.content = json.loads(string)

    @staticmethod
    def read(path):
        stored = tf.train.load_checkpoint(path).get_tensor("about/.ATTRIBUTES/py_state")
        return json.loads(stored)


class Checkpoint(keras.callbacks.Callback):
    """Saves the whole state of training, and takes a run that ended early up again, bit for bit.

    The whole state: weights, batch statistics, the seeds of random layers, the optimizer's state and loss scale, the
    epoch's metrics and reports so far, and the position in the epoch. It is saved at the end of every epoch, after
    every `every` steps, and on SIGTERM. `fit` with this callback looks into `directory` first: where it finds a
    checkpoint, it goes on from the newest one, inside the epoch if that is where it was; the same program, started
    again, is all there is to do. A checkpoint appears whole or not at all: a process killed while it writes leaves the
    one before it.

    On SIGTERM the step under way is finished and saved, and `fit` raises `Terminated`, which ends the process with the
    code 143 unless it is caught. SIGTERM on the last step of an epoch lets the validation run first. A second SIGTERM
    has its usual effect. Not saved is what other callbacks remember (the patience of `EarlyStopping`).

    What is random in the data is the caller's: `fit`'s own `shuffle=True` draws a new order in every process. Give it
    batches in the same order in every epoch (or `shuffle=False`) and nothing need be done; or make them from
    `checkpoint.position`:

    * a stream that depends on the epoch, from the beginning of epoch `checkpoint.position.epoch` on;
    * with `skip_batches=False`, a stream from exactly `checkpoint.position` on, which can skip before it decodes.

    Under `MirroredStrategy` and `MultiWorkerMirroredStrategy` every process has a part in saving, since variables of
    which each replica keeps a share are read by all together; only the chief's files are kept. All processes must see
    the same `directory`. A run may go on with another number of replicas; then all of them begin with the first one's
    batch statistics, where these are not synchronized.

    Args:
        directory: Where the checkpoints of this one run are; `gs://` works too. Created where it is not there.
        every: Steps between two checkpoints, besides those at the end of each epoch; `None`: those alone. Defaults to
            `None`.
        keep: How many of the newest checkpoints are kept. Defaults to `3`.
        on_signal: Whether SIGTERM is answered as above. Only the main thread can. Defaults to `True`.
        skip_batches: Whether the data of `fit` begin with the interrupted epoch, so that its batches up to the position
            are drawn and dropped; `False`: they begin at the position. Defaults to `True`.

    Raises:
        ValueError: At the start of `fit` where the newest checkpoint is of another model or optimizer, names other
            metrics, or is inside an epoch of another length; nothing is overwritten then.

    Put it first in the list, so that the others find the state restored.

    Example:

    ```python
    checkpoint = keras_curvature.callbacks.Checkpoint("run", every=500)
    model.fit(dataset, epochs=90, callbacks=[checkpoint])
    ```
    """

    def __init__(self, directory, every=None, keep=3, on_signal=True, skip_batches=True):
        super().__init__()
        check(self, "directory", directory, bool(directory) and isinstance(directory, (str, os.PathLike)), "a path")
        check_count(self, "keep", keep)
        if every is not None:
            check_count(self, "every", every)
        self.directory, self.every, self.keep = os.fspath(directory), every, keep
        self.on_signal, self.skip_batches = on_signal, skip_batches
        self._previous_handler = None

    @property
    def position(self):
        """The `Position` of the newest checkpoint, from which `fit` will go on; `(0, 0)` where there is none."""
        about = self._newest()
        return Position(*about["position"]) if about else Position(0, 0)

    def _newest(self):
        """What the newest checkpoint says of itself, and `path`; `None` where there is none."""
        path = tf.train.latest_checkpoint(self.directory)
        return None if path is None else {**_About.read(path), "path": path}

    # The start of a run.

    def on_train_begin(self, logs=None):
        """Go on where the newest checkpoint was."""
        _forget_what_was_left_out()
        keras_internals.begin_at_epoch(self.model, None)
        self._signalled, self._saved, self._looked_around, self._shares = False, None, 0, None
        self._strategy, self._resumed = self.model.distribute_strategy, self._newest()
        self._about, self._epoch, self._step, self._steps = _About(), 0, 0, 0
        self._several = replicas.of_several_workers(self._strategy)
        if self._resumed is not None:
            self._steps = self._looked_around = self._resumed["steps"]
        self._check_that_workers_agree()
        if self._resumed is not None:
            self._refuse_another_length()
            keras_internals.begin_at_epoch(self.model, self._resumed["position"][0])
            if self.model.built:
                self._restore(metrics=False)
        self._listen()

    def on_epoch_begin(self, epoch, logs=None):
        """The epoch in which the run goes on begins inside."""
        keras_internals.begin_at_epoch(self.model, None)  # Keras would begin a further `fit` there
        self._epoch, self._step = epoch, 0
        if self._resumed is None:
            return
        begins, self._step = self._resumed["position"]
        if begins != epoch:
            raise ValueError(
                f"`Checkpoint`: '{self._resumed['path']}' goes on in epoch {begins} and `fit` begins with {epoch}. "
                "Leave `initial_epoch` to the checkpoint."
            )
        _first_steps_left_out(self._step, self.skip_batches, self._restore_all)

    def _restore_all(self, epoch_iterator):
        """Before the first batch, when all that has a state can be built."""
        if not self.model.built or self._step:
            with self._strategy.scope():
                keras_internals.build(self.model, keras_internals.batch_spec(epoch_iterator))
            self._restore(metrics=self._step > 0)
        self._resumed = None

    def _refuse_another_length(self):
        """A position inside an epoch means nothing in an epoch of another length."""
        (epoch, step), length = self._resumed["position"], self.params.get("steps")
        if step and None not in (length, self._resumed["length"]) and length != self._resumed["length"]:
            raise ValueError(
                f"`Checkpoint`: '{self._resumed['path']}' was saved after {step} of the {self._resumed['length']} "
                f"steps of epoch {epoch}, and an epoch has {length} steps now. Go on with the batch size it was "
                "saved with, or begin anew in another `directory`."
            )

    def _check_that_workers_agree(self):
        """All of several processes go on from the same step."""
        if self._several and self._everywhere(self._steps) != self._steps:
            raise ValueError(
                f"`Checkpoint`: this process found a checkpoint after {self._steps} steps in '{self.directory}' and "
                "another one did not. All workers must see the same `directory`."
            )

    def _everywhere(self, number):
        """The mean of a number over the processes."""
        with self._strategy.scope():
            return float(_total(tf.constant(number, tf.float64))) / replicas.count()

    # The state.

    def _state(self, metrics):
        """`{group: [variables]}`."""
        optimizer = self.model.optimizer
        if not optimizer.built:
            with self._strategy.scope():
                optimizer.build(self.model.trainable_variables)
        groups = {"model": self.model.variables, "optimizer": optimizer.variables}
        if metrics:
            groups["metrics"] = [*self.model.metrics_variables, *_reports(self.model)]
        return groups

    def _describe(self, groups):
        """What must agree between a checkpoint and a run: kinds, names and shapes; not the counters in the names."""
        inner = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        described = {name: [[_plain(v.name), list(v.shape), v.dtype] for v in group] for name, group in groups.items()}
        return {**described, "optimizer_class": type(inner).__name__}

    def _checkpoint(self, groups, rows=None):
        parts = {name: [v.value for v in group] for name, group in groups.items()}
        if rows is not None:
            parts["shares"] = tf.Variable(rows)
        return tf.train.Checkpoint(about=self._about, **parts)

    def _restore(self, metrics):
        """Read the newest checkpoint into the variables, if it is theirs."""
        groups = self._state(metrics)
        self._refuse_another_state(self._describe(groups))
        self._checkpoint(groups).restore(self._resumed["path"]).assert_existing_objects_matched().expect_partial()
        own = self._own_shares()
        if own.variables and self._resumed["replicas"] == self._strategy.num_replicas_in_sync:
            reader = tf.train.load_checkpoint(self._resumed["path"])
            own.write(reader.get_tensor("shares/.ATTRIBUTES/VARIABLE_VALUE"))

    def _own_shares(self):
        """The `Shares`, made where the model is built."""
        self._shares = self._shares or Shares(self.model, self._strategy)
        return self._shares

    def _refuse_another_state(self, now):
        """Say the first thing in which the checkpoint differs from this run."""
        path, stored = self._resumed["path"], self._resumed["state"]
        if stored["optimizer_class"] != now["optimizer_class"]:
            raise ValueError(
                f"`Checkpoint`: '{path}' was saved by `{stored['optimizer_class']}` and the model is compiled with "
                f"`{now['optimizer_class']}`. Compile with the same optimizer, or begin anew in another `directory`."
            )
        for group in (name for name in now if name != "optimizer_class"):
            for i in range(max(len(stored[group]), len(now[group]))):
                there, here = (rows[i] if i < len(rows) else None for rows in (stored[group], now[group]))
                if there != here:
                    raise ValueError(
                        f"`Checkpoint`: '{path}' was saved with another {group.rstrip('s')}: variable {i} of its "
                        f"{len(stored[group])} is {_words(there)}, and here, of {len(now[group])}, {_words(here)}. Use "
                        "the one it was saved with, or begin anew in another `directory`."
                    )

    # Saving.

    def on_train_batch_begin(self, batch, logs=None):
        """Stop here, where all callbacks have seen the last step, if somebody has asked to."""
        if batch != self._step:
            raise RuntimeError(
                f"`Checkpoint`: the epoch was to go on at step {self._step} and does at {batch}: another callback has "
                "run the model in its `on_epoch_begin`. Let it do so later."
            )
        if self._asked_to_stop():
            self._save(Position(self._epoch, self._step))
            self._stop()

    def on_train_batch_end(self, batch, logs=None):
        """Save, where it is time to."""
        done = min(batch + 1, self.params.get("steps") or batch + 1)  # several steps per execution overshoot
        before, self._steps, self._step = self._steps, self._steps + done - self._step, done
        due = self.every is not None and self._steps // self.every > before // self.every
        if due and self._step != self.params.get("steps"):  # then the epoch's end saves
            self._save(Position(self._epoch, self._step))

    def on_epoch_end(self, epoch, logs=None):
        """Save; the position is the beginning of the next epoch."""
        self._save(Position(epoch + 1, 0))

    def on_train_end(self, logs=None):
        """Nothing is listened to any more."""
        keras_internals.begin_at_epoch(self.model, None)
        self._stop_listening()
        if self._asked_to_stop(now=True):
            self._stop()

    def _save(self, position):
        if self._saved == position:
            return
        self._saved = position
        groups = self._state(metrics=True)
        self._about.content = {
            "position": position, "steps": self._steps, "length": self.params.get("steps"),
            "replicas": self._strategy.num_replicas_in_sync, "state": self._describe(groups),
        }  # fmt: skip
        own = self._own_shares()
        checkpoint = self._checkpoint(groups, own.read() if own.variables else None)
        if is_chief(self._strategy):
            manager = tf.train.CheckpointManager(checkpoint, self.directory, max_to_keep=self.keep)
            manager.save(checkpoint_number=self._steps)
        else:  # reading the variables takes everybody; the files are of no use
            folder = tempfile.mkdtemp()
            try:
                checkpoint.write(os.path.join(folder, "part"))
            finally:
                shutil.rmtree(folder)

    # Stopping.

    def _listen(self):
        if self.on_signal and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number, frame):
        """The handler: note the first signal, and leave a second one to whoever had it before."""
        self._signalled = True
        self._stop_listening()

    def _stop_listening(self):
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _asked_to_stop(self, now=False):
        """Whether SIGTERM has come, to this process or, as all find out at the same step, to another."""
        if not self._several:
            return self._signalled
        due = self._steps >= self._looked_around + AGREE_EVERY
        if not self.on_signal or not (due or now):
            return False
        self._looked_around = self._steps
        return self._everywhere(float(self._signalled)) > 0

    def _stop(self):
        self._stop_listening()
        raise Terminated(f"stopped by SIGTERM after {self._steps} steps; the state is in '{self.directory}'")


@tf.function
def _total(number):
    return replicas.total(tf.identity, number)


# Private names of Keras 3.15; `tests/test_checkpoint.py` fails where they are gone.


def _first_steps_left_out(step, draw, ready):
    """Let the next epoch of `fit` begin at `step`; `ready(epoch_iterator)` is called before its first batch.

    With `draw`, the batches of the steps left out are drawn and dropped.
    """

    if "_enumerate_iterator" in vars(TFEpochIterator):
        _forget_what_was_left_out()
        raise ValueError("`Checkpoint`: one `fit` goes on from one checkpoint, and there are two of these callbacks.")

    def once(epoch_iterator):
        _forget_what_was_left_out()
        ready(epoch_iterator)
        return (left for left in epoch_iterator._enumerate_iterator() if not leave_out(*left, epoch_iterator))

    def leave_out(begin, end, iterator, epoch_iterator):
        if begin >= step:
            return False
        if draw:
            for _ in range(min(end + 1, step) - begin):
                next(iterator)
        return True

    TFEpochIterator._enumerate_iterator = once


def _forget_what_was_left_out():
    """Keras' own generator again, which is inherited; a `fit` that failed as it began has left ours behind."""
    if "_enumerate_iterator" in vars(TFEpochIterator):
        del TFEpochIterator._enumerate_iterator


def _reports(model):
    """The variables of a curved model's reports."""
    reports = reports_of(model)
    return [variable for name in sorted(reports) for variable in reports[name].variables]


def _plain(name):
    """A variable's name without the numbers that Keras counts the layers of a process with."""
    return re.sub(r"_\d+", "", name)


def _words(row):
    return "missing" if row is None else f"`{row[0]}` {tuple(row[1])} {row[2]}"
