"""The distributions of the targets whose negative logarithms are Keras losses.

A loss `-log p(y | z)` has a Fisher matrix: the expectation of the squared slope when the labels are drawn from the
model. Each class draws the labels of one distribution and computes their slopes. `sampling.py` finds the weight of each
entry of the batch in the compiled loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

Uniform: TypeAlias = Callable[[tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A distribution `p(y | z)` of the targets; a Keras loss is its negative logarithm.

    `z` is the leaf that the loss reads, in float32 or float64: the logits, or the model's output if it has no logits.

    Attributes:
        options: The arguments of the Keras loss, a dict.
        logits: Whether `z` are logits.
        by_rows: Whether each row (the last axis) of `z` has one label, rather than each entry.
    """

    options: dict[str, Any]
    logits: bool
    by_rows = False

    def sample(self, z: tf.Tensor, uniform: Uniform) -> tf.Tensor:
        """Labels drawn from the model; `uniform(shape)` draws numbers in [0, 1)."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `sample(z, uniform)`.")

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """Labels at which the slope is far from zero and not clipped by Keras."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `reference(z)`.")

    def slope(self, z: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The derivative of `-log p(labels | z)` with respect to `z`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `slope(z, labels)`.")

    def information(self, z: tf.Tensor) -> tf.Tensor:
        """The Fisher information of each entry of `z`: the expectation of the squared slope."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `information(z)`.")

    def targets(self, labels: tf.Tensor, z: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """`labels` as the loss takes them; `y` are the true ones."""
        return labels


class Gaussian(Likelihood):
    """`-log p = (z - y)^2`, of variance 1/2: the Fisher information is the second derivative 2."""

    def sample(self, z: tf.Tensor, uniform: Uniform) -> tf.Tensor:
        """By the inverse of the distribution function: uniform numbers do not depend on how the batch is cut."""
        return z + tf.math.erfinv(_symmetric(uniform(tf.shape(z))))

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """One below."""
        return z - 1.0

    def slope(self, z: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """`2 (z - y)`."""
        return 2.0 * (z - labels)

    def information(self, z: tf.Tensor) -> tf.Tensor:
        """2."""
        return 2.0 * tf.ones_like(z)


class Laplace(Likelihood):
    """`-log p = |z - y|`: Fisher information 1, where the second derivative is 0."""

    def sample(self, z: tf.Tensor, uniform: Uniform) -> tf.Tensor:
        """An exponential distance to either side."""
        u = _symmetric(uniform(tf.shape(z)))
        return z - tf.sign(u) * tf.math.log1p(-tf.abs(u))

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """One below."""
        return z - 1.0

    def slope(self, z: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The side."""
        return tf.sign(z - labels)

    def information(self, z: tf.Tensor) -> tf.Tensor:
        """1."""
        return tf.ones_like(z)


class Poisson(Likelihood):
    """`-log p = z - y log z`, for a rate `z`."""

    def sample(self, z: tf.Tensor, uniform: Uniform) -> tf.Tensor:
        """By the inverse of the distribution function; for rates above 64, rounded from the normal distribution."""
        u = uniform(tf.shape(z))
        rate, wide = tf.cast(tf.minimum(z, 64.0), tf.float64), tf.cast(u, tf.float64)

        def beyond(k, term, below, labels):
            return (k < 200.0) & tf.reduce_any(wide >= below)

        def count(k, term, below, labels):
            labels += tf.cast(wide >= below, z.dtype)
            term *= rate / (k + 1.0)
            return k + 1.0, term, below + term, labels

        none = tf.exp(-rate)
        *_, labels = tf.while_loop(beyond, count, (tf.constant(0.0, tf.float64), none, none, tf.zeros_like(z)))
        normal = tf.round(z + tf.sqrt(2.0 * z) * tf.math.erfinv(_symmetric(u)))
        return tf.where(z > 64.0, normal, labels)

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """None."""
        return tf.zeros_like(z)

    def slope(self, z: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """`1 - y / z`."""
        return 1.0 - labels / (z + keras.config.epsilon())

    def information(self, z: tf.Tensor) -> tf.Tensor:
        """`1 / z`."""
        return 1.0 / (z + keras.config.epsilon())


class Bernoulli(Likelihood):
    """`-log p = -y log p - (1 - y) log(1 - p)`, with `p` the sigmoid of `z`, or `z` itself."""

    def sample(self, z: tf.Tensor, uniform: Uniform) -> tf.Tensor:
        """Zeros and ones."""
        return tf.cast(uniform(tf.shape(z)) < self._p(z), z.dtype)

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """With logits the improbable label, with probabilities the probable one: Keras clips the other one near 0."""
        probable = tf.cast(self._p(z) >= 0.5, z.dtype)
        return 1.0 - probable if self.logits else probable

    def slope(self, z: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """`p - y`; with probabilities, divided by `p (1 - p)`."""
        p = self._p(z)
        return p - labels if self.logits else (p - labels) / (p * (1.0 - p))

    def information(self, z: tf.Tensor) -> tf.Tensor:
        """`p (1 - p)`; with probabilities, its inverse."""
        p = self._p(z)
        return p * (1.0 - p) if self.logits else 1.0 / (p * (1.0 - p))

    def targets(self, labels: tf.Tensor, z: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """With the smoothing taken back that Keras will do."""
        smoothing = self.options.get("label_smoothing", 0.0)
        return (labels - 0.5 * smoothing) / (1.0 - smoothing)

    def _p(self, z):
        eps = keras.config.epsilon()
        return tf.sigmoid(z) if self.logits else tf.clip_by_value(z, eps, 1.0 - eps)


class Categorical(Likelihood):
    """`-log p = -log p_y`, with `p` the softmax of `z`, or `z` itself over its sum. Labels are class indices."""

    by_rows = True

    def sample(self, z: tf.Tensor, uniform: Uniform) -> tf.Tensor:
        """By the inverse of the distribution function: one uniform number for each row."""
        up_to = tf.cumsum(self._p(z), axis=-1)
        u = uniform(tf.shape(z)[:-1])[..., tf.newaxis] * up_to[..., -1:]
        return tf.minimum(tf.reduce_sum(tf.cast(up_to <= u, tf.int32), -1), tf.shape(z)[-1] - 1)

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """With logits the least probable label, with probabilities the most: Keras clips the others near 0."""
        p = self._p(z)
        return tf.argmin(p, -1, tf.int32) if self.logits else tf.argmax(p, -1, tf.int32)

    def slope(self, z: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """`p - e_y`; with probabilities `1 - e_y / p_y`, without the 1 if the loss does not normalize them."""
        one_hot = tf.one_hot(labels, z.shape[-1], dtype=z.dtype)
        if self.logits:
            return tf.nn.softmax(z) - one_hot
        return self._of_the_sum(z) - tf.math.divide_no_nan(one_hot, z)

    def information(self, z: tf.Tensor) -> tf.Tensor:
        """The probabilities of the labels, which weigh the labels' slopes in the information of a row."""
        return self._p(z)

    def targets(self, labels: tf.Tensor, z: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """One-hot, with Keras' later label smoothing undone."""
        smoothing = self.options.get("label_smoothing", 0.0)
        one_hot = tf.one_hot(labels, z.shape[-1], dtype=z.dtype)
        return (one_hot - smoothing / z.shape[-1]) / (1.0 - smoothing)

    def _p(self, z):
        return tf.nn.softmax(z) if self.logits else tf.math.divide_no_nan(z, tf.reduce_sum(z, -1, keepdims=True))

    def _of_the_sum(self, z):
        """The part of the slope that comes from `log sum(z)`."""
        return tf.math.reciprocal_no_nan(tf.reduce_sum(z, -1, keepdims=True))


class Divergence(Categorical):
    """`-log p = -log z_y` of probabilities `z` that the loss does not normalize: the Kullback-Leibler divergence."""

    def _of_the_sum(self, z):
        return tf.zeros_like(z)


class SparseCategorical(Categorical):
    """`Categorical` for a loss that takes indices and may ignore one class."""

    def reference(self, z: tf.Tensor) -> tf.Tensor:
        """As in `Categorical`, but never the ignored class."""
        left_out = self.options.get("ignore_class")
        p, away = self._p(z), 2.0 if self.logits else -2.0
        if left_out is not None:
            p += away * tf.one_hot(left_out, z.shape[-1], dtype=z.dtype)
        return (tf.argmin if self.logits else tf.argmax)(p, -1, tf.int32)

    def targets(self, labels: tf.Tensor, z: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Indices; entries whose true label is the ignored class keep that label."""
        left_out = self.options.get("ignore_class")
        if left_out is None:
            return labels
        return tf.where(tf.reshape(tf.cast(y, tf.int32), tf.shape(labels)) == left_out, left_out, labels)


def _symmetric(uniform):
    """Maps [0, 1) into (-1, 1)."""
    return (2.0 * uniform - 1.0) * (1.0 - 1e-6)
