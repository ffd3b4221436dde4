"""Look at the first batch that `fit` trains on.

Keras shows no batches to callbacks: `fit` passes an iterator to the train function, which reads it inside a graph. So
    the
train function is replaced for one call. The replacement reads the batches of this call, and passes the train function
an iterator that yields the same batches again. The train function sees no difference and is not traced again.
"""

import tensorflow as tf

from keras_curvature import replicas


def watch(model, take):
    """Call `take(batch)` with the first batch of the next call of the model's train function.

    Args:
        model: A compiled `keras.Model` in `fit`, with its train function built.
        take: A function of the batch as the iterator yields it: a nest of tensors, or of per-replica values.
    """
    # a `fit` that failed before its first batch left a replacement behind
    original = getattr(model.train_function, "watched", model.train_function)

    def once(iterator):
        model.train_function = original
        batches = _draw(iterator, model.steps_per_execution) if replicas.is_iterator(iterator) else []
        if not batches:
            return original(iterator)
        take(batches[0])
        return original(_once_more(iterator, batches))

    once.watched = original
    model.train_function = once


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
