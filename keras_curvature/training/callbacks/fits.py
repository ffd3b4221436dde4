"""The running call of `fit`: clean-up when it ends, and changes of the steps of its next epoch.

Keras' `fit` always begins at the start of an epoch, does not pass batches to callbacks, and does not tell callbacks
when it fails. The import of this file therefore replaces three of its functions permanently (see
`keras_internals.guards`). `Fit.of(model)` is the running call of `fit`, and can change the steps of its next epoch. The
steps of `evaluate` and of another `fit` do not change.
"""

import contextlib
import contextvars

from keras_curvature import keras_internals

# per thread; a nested `fit` hides the outer one
_under_way = contextvars.ContextVar("under_way", default=None)


class Fit:
    """A running call of `fit`."""

    def __init__(self, model, ends):
        self._model, self._ends = model, ends
        self._iterator, self._position, self._changes = None, None, []

    @staticmethod
    def of(model):
        """The innermost `Fit` in this thread if it trains `model`; else `None`, as in a custom training loop."""
        fit = _under_way.get()
        return fit if fit is not None and fit._model is model else None

    def at_end(self, function):
        """Call `function()` when `fit` ends or fails."""
        self._ends.callback(function)

    def begin_epoch_at(self, step, draw, ready):
        """Let the next epoch begin at a later step.

        Args:
            step: The first step.
            draw: Whether to draw and drop the batches of the skipped steps.
            ready: A function of the epoch iterator, called before the first batch.
        """
        if self._position is not None:
            raise ValueError(
                "`Checkpoint`: one `fit` can continue only one checkpoint. Received: two of these callbacks. Pass one."
            )
        self._position = (step, draw, ready)

    def change_next_epoch(self, change):
        """Replace the steps of the next epoch by `change(steps)`; `steps` yields `(first, last, iterator)`."""
        self._changes.append(change)

    def _steps(self, steps, epoch_iterator):
        """The steps of an epoch, with the requested changes."""
        if self._position is not None:
            steps = self._from_position(steps, epoch_iterator)
        changes, self._changes = self._changes, []
        for change in changes:
            steps = change(steps)
        return steps

    def _from_position(self, steps, epoch_iterator):
        """The steps of an epoch, without the skipped ones."""
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
                f"`Checkpoint`: the epoch continues at step {step}, but the data end before. Pass the data that the "
                "run began with; or, if the data begin at the position, use `Checkpoint(..., skip_batches=False)`."
            )


def _drop(iterator, count):
    """Drop `count` batches; returns whether there were as many."""
    return all(next(iterator, None) is not None for _ in range(count))


def _fit(original, model, *args, **kwargs):
    with contextlib.ExitStack() as ends:
        token = _under_way.set(Fit(model, ends))
        ends.callback(_under_way.reset, token)
        return original(model, *args, **kwargs)


def _new_iterator(original, epoch_iterator, *args, **kwargs):
    fit = _under_way.get()
    if fit is not None and fit._iterator is None:  # the first iterator that `fit` creates is the training one
        fit._iterator = epoch_iterator
    original(epoch_iterator, *args, **kwargs)


def _steps_of_epoch(original, epoch_iterator):
    fit = _under_way.get()
    if fit is None or fit._iterator is not epoch_iterator:
        return original(epoch_iterator)
    return keras_internals.changed_steps(
        original(epoch_iterator), epoch_iterator, lambda steps: fit._steps(steps, epoch_iterator)
    )


keras_internals.guard(*keras_internals.FIT, _fit)
keras_internals.guard(*keras_internals.NEW_ITERATOR, _new_iterator)
keras_internals.guard(*keras_internals.STEPS_OF_EPOCH, _steps_of_epoch)
