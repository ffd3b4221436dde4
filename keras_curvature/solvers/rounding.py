"""Rounding to half precision at random, so that an average over many steps keeps changes smaller than a digit."""

import tensorflow as tf

from keras_curvature.typing import Integer


def rounded_at_random(tensor: tf.Tensor, step: Integer, number: int) -> tf.Tensor:
    """Each entry rounded up or down to bfloat16, with the probabilities that make its mean the entry; in float32.

    A running average with the decay 0.999 changes by a thousandth in a step, and bfloat16 resolves 1/128 to 1/256:
    rounded to nearest it would never change. Equal `step` and `number` give equal results on all replicas.
    """
    bits = tf.bitcast(tf.cast(tensor, tf.float32), tf.uint32)
    seed = tf.stack([tf.cast(step, tf.int32), tf.constant(number, tf.int32)])
    noise = tf.random.stateless_uniform(tensor.shape, seed, minval=None, maxval=None, dtype=tf.uint32)
    low = tf.constant(0xFFFF, tf.uint32)
    # bfloat16 is the upper half of float32: a carry out of the lower half is the next number
    upper = tf.bitwise.bitwise_and(bits + tf.bitwise.bitwise_and(noise, low), tf.bitwise.invert(low))
    return tf.bitcast(upper, tf.float32)
