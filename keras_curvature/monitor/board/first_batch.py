"""The first batch that `fit` trains on, seen in passing.

Keras shows its callbacks no batches: `fit` hands the train function an iterator, which draws from it inside of a graph.
So the train function is replaced for one call, by one that draws the batches of this call, and hands the train function
an iterator that gives the same batches out again. The train function cannot tell, and is not traced another time.
"""

import tensorflow as tf

from keras_curvature import replicas


def watch(model, take):
    """Call `take(batch)` with the first batch of the next call of the model's train function.

    Args:
        model: A compiled `keras.Model` in `fit`, whose train function is made.
        take: A function of the batch as the iterator gives it, a nest of tensors or of what the replicas get.
    """
    # a `fit` that failed before its first batch has left one behind
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
    """The next batches, as many as there are up to `steps`."""
    batches = []
    while len(batches) < steps:
        batch = iterator.get_next_as_optional()
        if not batch.has_value():
            break
        batches.append(batch.get_value())
    return batches


def _once_more(iterator, batches):
    """What gives these batches as `iterator` did."""
    if not isinstance(iterator, tf.data.Iterator):
        return iter(batches)  # of several replicas, which Keras takes too
    data = tf.data.Dataset.from_tensors(batches[0])
    for batch in batches[1:]:
        data = data.concatenate(tf.data.Dataset.from_tensors(batch))
    # Of the shapes that `iterator` announces, and not of those that these batches have: the train function would be
    # traced for them once more.
    variant = tf.data.experimental.to_variant(data)
    return iter(tf.data.experimental.from_variant(variant, iterator.element_spec))
