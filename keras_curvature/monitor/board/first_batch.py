"""Look at the first batch that `fit` trains on.

Keras shows no batches to callbacks: `fit` passes an iterator to the train function, which reads it inside a graph. So
this file reads the batches of one call before it, and passes the train function an iterator that yields them again. The
train function sees no difference and is not traced again.
"""

import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.training.callbacks.fits import Fit


def watch(model, take):
    """Call `take(batch)` with the first batch of the next epoch, before its first step. Only `fit` has epochs.

    Args:
        model: A compiled `keras.Model`.
        take: A function of the batch as the iterator yields it: a nest of tensors, or of per-replica values.
    """
    fit = Fit.of(model)
    if fit is not None:
        fit.change_next_epoch(lambda steps: _watched(steps, take))


def _watched(steps, take):
    """The same steps; the first one gets an iterator that begins with the batches that are read already."""
    for first, last, iterator in steps:
        batches = _draw(iterator, last - first + 1) if replicas.is_iterator(iterator) else []
        if batches:
            take(batches[0])
        yield first, last, _once_more(iterator, batches) if batches else iterator
        break
    yield from steps


def _draw(iterator, steps):
    """The next batches, at most `steps`."""
    batches = []
    while len(batches) < steps:
        batch = iterator.get_next_as_optional()
        if not batch.has_value():
            break
        batches.append(batch.get_value())
    return batches


def _once_more(iterator, batches):
    """An iterator over these batches like `iterator`."""
    if not isinstance(iterator, tf.data.Iterator):
        return iter(batches)  # per-replica batches; Keras takes a plain iterator of these
    data = tf.data.Dataset.from_tensors(batches[0])
    for batch in batches[1:]:
        data = data.concatenate(tf.data.Dataset.from_tensors(batch))
    # With the shapes that `iterator` announces: the train function would be traced again for those of the batches.
    variant = tf.data.experimental.to_variant(data)
    return iter(tf.data.experimental.from_variant(variant, iterator.element_spec))
