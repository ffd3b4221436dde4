"""A call of `fit` that is under way: what is undone however it ends, and the steps that an epoch leaves out.

Keras' `fit` begins at an epoch, and tells no callback that it has failed. Two of its functions are therefore replaced
for good (see `keras_internals.guards`), as this file is imported: a call of `fit` that is under way is known to be so,
and its own iterator over the steps can leave the first ones out. For every other iterator, in `evaluate` or in another
`fit`, they are the originals.
"""

import contextlib
import contextvars

from keras_curvature import keras_internals

_under_way = contextvars.ContextVar("under_way", default=None)  # per thread; a `fit` inside a `fit` hides the outer one


class Fit:
    """A call of `fit` that is under way; `Fit.of(model)` is the innermost one."""

    def __init__(self, model, ends):
        self._model, self._ends = model, ends
        self._iterator, self._change = None, None

    @staticmethod
    def of(model):
        """The `Fit` of this model, in this thread; `None` outside `fit`, as in a loop of one's own."""
        fit = _under_way.get()
        return fit if fit is not None and fit._model is model else None

    def at_end(self, function):
        """Call `function()` when `fit` ends, also when it fails."""
        self._ends.callback(function)

    def begin_epoch_at(self, step, draw, ready):
        """Let the next epoch begin at `step`; `ready(epoch_iterator)` is called before its first batch.

        With `draw`, the batches of the steps left out are drawn and dropped.
        """
        if self._change is not None:
            raise ValueError("`Checkpoint`: one `fit` continues one checkpoint. Received: two of these callbacks.")
        self._change = (step, draw, ready)

    def _steps(self, steps_of, epoch_iterator):
        """The steps of an epoch, without those left out."""
        (step, draw, ready), self._change = self._change, None
        ready(epoch_iterator)
        reached = False
        for begin, end, iterator in steps_of(epoch_iterator):
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
    if fit is None or fit._iterator is not epoch_iterator or fit._change is None:
        return original(epoch_iterator)
    return fit._steps(original, epoch_iterator)


keras_internals.guard(*keras_internals.FIT, _fit)
keras_internals.guard(*keras_internals.NEW_ITERATOR, _new_iterator)
keras_internals.guard(*keras_internals.STEPS_OF_EPOCH, _steps_of_epoch)
