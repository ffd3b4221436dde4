"""Randomness that does not depend on how the batch is cut.

TensorFlow's stateless generators count: number `j` of a tensor depends only on a key and `counter + j // n`, where one
step of the counter makes `n` numbers (Philox: 128 bits). So a slice can draw its rows of the whole batch's draw without
the others: the counter is advanced, and the first few numbers are dropped if the slice begins inside a step. On the
CPU, on a GPU and with XLA on both, masks equal the whole batch's masks bit for bit.

`by_rows` replaces the generators while a model is linearized; see `differentiable.py`.

This holds for tensors with one row, or an equal number of rows, per example. They are drawn by
`tf.random.stateless_uniform` and `stateless_normal`, and so by `keras.random.uniform`, `normal`, `randint`, `dropout`
and by Keras' layers; without XLA also by `truncated_normal`. Slices share tensors of other lengths. Only the length of
the first axis distinguishes the two: a shared tensor whose length is a multiple of the slice's is drawn by rows too. On
a slice with a single example this applies to every tensor with an axis. In a graph that does not know the length, it
applies to every tensor of unknown length.

Two slices never get the same numbers, however the batch is cut. But the numbers differ from the whole batch's (1) on a
TPU, which has another generator; (2) under XLA for normal numbers, whose order depends on the shape. Draws of `gamma`,
`beta`, `binomial` and `categorical` depend only on the seed, as in Keras.
"""

import math

import tensorflow as tf

from keras_curvature import keras_internals

PHILOX = 1
# Binary digits of the uniform numbers made from integers: all digits of a float32.
DIGITS = 24
# Steps of the counter that TensorFlow leaves for one number of the truncated normal distribution, which may take many
# tries. Of the others one step makes a group of numbers.
TRIES = 64


def uniform(shape, seed, dtype):
    """Uniform numbers in [0, 1), made from integers, which are the same under XLA; XLA's floats are not."""
    integers = tf.random.stateless_uniform(shape, seed, 0, 2**DIGITS, tf.int32)
    return tf.cast(integers, dtype) * 2.0**-DIGITS


def normal(shape, seed, dtype):
    """Normal numbers, two of each two words of random bits (Box and Muller); the same under XLA."""
    size = tf.TensorShape(shape).num_elements()
    length, angle = tf.unstack(tf.random.stateless_uniform([2, -(-size // 2)], seed, None, None, tf.int32))
    # in the middle of its step, and so never 0; an angle can have any value
    inside = (tf.cast(tf.bitwise.bitwise_and(length, 2**DIGITS - 1), dtype) + 0.5) * 2.0**-DIGITS
    radius, angle = tf.sqrt(-2.0 * tf.math.log(inside)), tf.cast(angle, dtype) * (math.pi * 2.0**-31)
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], 0)
    return tf.reshape(pairs[:size], shape)


def by_rows(original, place, shape, *, counter, alg, tries=None, **choices):
    """Draw the rows of a place in the whole batch.

    Args:
        original: One of TensorFlow's stateless generators.
        place: A `Place`.
        shape, counter, alg, choices: As the generator takes them.
        tries: Steps of the counter for each number. Defaults to one step for each group of numbers.
    """
    row = _numbers_per_example(shape, place.examples)
    if row is None:
        return original(shape, counter=counter, alg=alg, **choices)
    group = 2 if tf.as_dtype(choices.get("dtype") or choices["minval"].dtype).size == 8 else 4
    before = _wide(place.start) * row[0] * row[1]
    steps = 1 if tries is None else tries * group
    choices |= {"counter": _moved(counter, before // group * steps), "alg": PHILOX}
    dropped = 0 if any(isinstance(r, int) and r % group == 0 for r in row) else before % group
    # in a row, because under XLA the order of normal numbers depends on the shape
    size = tf.reduce_prod(tf.cast(shape, tf.int64))
    if isinstance(dropped, int) and dropped == 0:
        return tf.reshape(original(size[tf.newaxis], **choices), shape)
    numbers = original(size[tf.newaxis] + (group - 1), **choices)
    return tf.reshape(tf.slice(numbers, tf.cast([dropped], tf.int64), [size]), shape)


def _numbers_per_example(shape, examples):
    """`(rows, numbers in a row)` of a tensor for each example, integers or tensors; `None` where it is shared."""
    static, shape = keras_internals.static_shape(shape), tf.cast(shape, tf.int64)
    if not static.rank:
        return None
    leading, others = static[0], static[1:]
    numbers = others.num_elements() if others.is_fully_defined() else tf.reduce_prod(shape[1:])
    if leading is None:
        return shape[0] // tf.maximum(_wide(examples), 1), numbers
    if isinstance(examples, int) and examples and leading % examples == 0:
        return leading // examples, numbers
    return None


def _moved(counter, steps):
    """The counter after so many steps; its lower half begins at 0 and cannot overflow."""
    steps = tf.stack([tf.cast(steps, tf.int64), tf.constant(0, tf.int64)])
    return tf.bitcast(tf.bitcast(counter, tf.int64) + steps, tf.uint64)


def _wide(number):
    return number if isinstance(number, int) else tf.cast(number, tf.int64)
