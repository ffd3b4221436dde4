"""A call of `fit` that is under way: what to undo when it ends, and changes of the steps of its next epoch.

Keras' `fit` begins at the start of an epoch, shows callbacks no batches, and tells no callback that it has failed. The
import of this file therefore replaces three of its functions for good (see `keras_internals.guards`). `Fit.of(model)`
is the call of `fit` that is under way, and its iterator over the steps can be changed for one epoch. Every other
iterator, in `evaluate` or in another `fit`, is left as it is.
"""

import contextlib
import contextvars

from keras_curvature import keras_internals

_under_way = contextvars.ContextVar("under_way", default=None)  # per thread; a `fit` inside a `fit` hides the outer one


class Fit:
    """A call of `fit` that is under way; `Fit.of(model)` is the innermost one."""

    def __init__(self, model, ends):
        self._model, self._ends = model, ends
        self._iterator, self._position, self._changes = None, None, []

    @staticmethod
    def of(model):
        """The `Fit` of this model, in this thread; `None` outside `fit`, as in a custom training loop."""
        fit = _under_way.get()
        return fit if fit is not None and fit._model is model else None

    def at_end(self, function):
        """Call `function()` when `fit` ends, also when it fails."""
        self._ends.callback(function)

    def begin_epoch_at(self, step, draw, ready):
        """Let the next epoch begin at `step`; `ready(epoch_iterator)` is called before its first batch.

        With `draw`, the batches of the steps left out are drawn and dropped.
        """
        if self._position is not None:
            raise ValueError("`Checkpoint`: one `fit` continues one checkpoint. Received: two of these callbacks.")
        self._position = (step, draw, ready)

    def change_next_epoch(self, change):
        """Let the next epoch have the steps `change(steps)`; `steps` yields `(first step, last step, iterator)`."""
        self._changes.append(change)

    def _steps(self, steps, epoch_iterator):
        """The steps of an epoch, with the changes that were asked for."""
        if self._position is not None:
            steps = self._from_position(steps, epoch_iterator)
        changes, self._changes = self._changes, []
        for change in changes:
            steps = change(steps)
        return steps

    def _from_position(self, steps, epoch_iterator):
        """The steps of an epoch, without those left out."""
        (step, draw, ready), self._position = self._position, None
        ready(epoch_iterator)
        reached = False
        for begin, end, iterator in steps:
            if begin >= step:
                reached = True
                yield begin, end, iterator
            elif draw and not _drop(iterator, min(end + 1, step) - begin):
                break
        if not reached:
            raise ValueError(
                f"`Checkpoint`: the epoch was to continue at step {step}, and its data ended before. Give `fit` the "
                "data that the run began with; or, if the data begin at the position, use `skip_batches=False`."
            )


def _drop(iterator, count):
    """Drop so many batches; returns whether there were as many."""
    return all(next(iterator, None) is not None for _ in range(count))


def _fit(original, model, *args, **kwargs):
    with contextlib.ExitStack() as ends:
        token = _under_way.set(Fit(model, ends))
        ends.callback(_under_way.reset, token)
        return original(model, *args, **kwargs)


def _new_iterator(original, epoch_iterator, *args, **kwargs):
    fit = _under_way.get()
    if fit is not None and fit._iterator is None:  # the first one that `fit` makes is its own
        fit._iterator = epoch_iterator
    original(epoch_iterator, *args, **kwargs)


def _steps_of_epoch(original, epoch_iterator):
    fit = _under_way.get()
    if fit is None or fit._iterator is not epoch_iterator:
        return original(epoch_iterator)
    return fit._steps(original(epoch_iterator), epoch_iterator)


keras_internals.guard(*keras_internals.FIT, _fit)
keras_internals.guard(*keras_internals.NEW_ITERATOR, _new_iterator)
keras_internals.guard(*keras_internals.STEPS_OF_EPOCH, _steps_of_epoch)
