"""Small networks: plain Keras models whose outputs are logits.

The functions take shapes but no seeds; `registry.py` wraps them in `seeded`. The last layers have no softmax, because
the Gauss-Newton matrix of a cross-entropy is computed with respect to the logits.
"""

import math
import random

import keras
import tensorflow as tf
from keras import layers, ops

from keras_curvature.typing import Config, Shape


def mlp(widths, activation="relu", name="mlp"):
    """Dense layers of the given widths: (batch, widths[0]) -> (batch, widths[-1]) logits."""
    hidden = [layers.Dense(width, activation=activation) for width in widths[1:-1]]
    return _chain((widths[0],), [*hidden, layers.Dense(widths[-1])], name)


def autoencoder(widths=(784, 1000, 500, 250, 30), name="autoencoder"):
    """The deep autoencoder of Hinton and Salakhutdinov (2006) and Martens (2010): (batch, 784) -> (batch, 784).

    The decoder has the widths of the encoder in reverse. Hidden layers are logistic, the code layer is linear, weights
    are `SparseNormal`, biases zero. The outputs are logits: train with `BinaryCrossentropy(from_logits=True)`, which
    averages over the pixels; the papers sum.
    """
    if len(widths) < 2:
        raise ValueError(f"`autoencoder`: `widths` must have at least two entries. Received: widths={widths}")
    encoder, code, decoder = widths[1:-1], widths[-1], widths[-2:0:-1]
    dense = [_sparse_dense(width, "sigmoid") for width in encoder]
    dense.append(_sparse_dense(code, None))
    dense.extend(_sparse_dense(width, "sigmoid") for width in decoder)
    return _chain((widths[0],), [*dense, _sparse_dense(widths[0], None)], name)


def cnn(batch_normalization=False, name="cnn"):
    """Three 3x3 convolutions and two dense layers: (batch, 32, 32, 3) -> (batch, 10)."""
    stack = []
    for filters in (32, 64, 64):
        stack.append(layers.Conv2D(filters, 3, padding="same", use_bias=not batch_normalization))
        stack.extend([layers.BatchNormalization()] if batch_normalization else [])
        stack.extend([layers.ReLU(), layers.MaxPooling2D()])
    stack += [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10)]
    return _chain((32, 32, 3), stack, name)


def curveball_cnn(batch_normalization=False, name="curveball_cnn"):
    """The "basic" network of the CurveBall paper (arXiv 1805.08095): (batch, 32, 32, 3) -> (batch, 10).

    Convolutions 5x5 to 32, 32 and 64 channels, each followed by 3x3 pooling with stride 2, then 4x4 to 64 and 1x1 to
    10; weights from `N(0, 0.01^2)` in the first layer and `N(0, 0.05^2)` elsewhere. The poolings are max, average,
    average as in the authors' code; the paper has max in all. They pad zeros on every side, whereas TensorFlow's
    `"same"` would pad one side only.

    Images are in [0, 1]; the model standardizes their channels, as the authors' PyTorch port does. Their Matlab code
    whitens the images instead. Both crop and flip at random; this model does not.
    """

    def convolution(filters, size, stddev=0.05, padding="same"):
        start = keras.initializers.RandomNormal(stddev=stddev)
        yield layers.Conv2D(filters, size, padding=padding, kernel_initializer=start)
        if batch_normalization:
            yield layers.BatchNormalization(epsilon=1e-4)  # as the authors; Keras has 1e-3
        yield layers.ReLU()

    def pooling(layer):
        return [layers.ZeroPadding2D(1), layer(3, strides=2)]

    # the port's numbers; the standard deviations over all pixels of CIFAR-10 are nearer to 0.25
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    shift = [-m / d for m, d in zip(mean, deviation, strict=True)]
    stack = [
        layers.Rescaling([1 / d for d in deviation], offset=shift),
        *convolution(32, 5, stddev=0.01),
        *pooling(layers.MaxPooling2D),  # (batch, 16, 16, 32)
        *convolution(32, 5),
        *pooling(layers.AveragePooling2D),  # (batch, 8, 8, 32)
        *convolution(64, 5),
        *pooling(layers.AveragePooling2D),  # (batch, 4, 4, 64)
        *convolution(64, 4, padding="valid"),  # (batch, 1, 1, 64)
        layers.Conv2D(10, 1, kernel_initializer=keras.initializers.RandomNormal(stddev=0.05)),
        layers.Flatten(),
    ]
    return _chain((32, 32, 3), stack, name)


def transformer(
    vocabulary=64, length=32, width=64, heads=4, blocks=2, classes=4, dropout=0.0, name="transformer"
):
    """A small pre-normalization encoder with average pooling over positions: (batch, length) -> (batch, classes)."""
    inputs = keras.Input((length,), dtype="int32")
    x = TokenAndPosition(vocabulary, length, width)(inputs)  # (batch, length, width)
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(heads, width // heads, dropout=dropout)
        x = layers.Add()([x, attention(normal, normal)])
        hidden = layers.Dense(2 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dropout(dropout)(layers.Dense(width)(hidden))])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))  # (batch, width)
    return keras.Model(inputs, layers.Dense(classes)(x), name=name)


def causal_block(x, heads):
    """A block of a decoder, with normalization before each part: (batch, length, width) -> the same."""
    width = x.shape[-1]
    normal = layers.LayerNormalization()(x)
    x += layers.MultiHeadAttention(heads, width // heads)(normal, normal, use_causal_mask=True)
    x += layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x)))
    return x


def lstm(length=16, features=2, width=32, classes=2, unroll=False, name="lstm"):
    """An LSTM layer and a dense layer on its last state: (batch, length, features) -> (batch, classes)."""
    return _chain((length, features), [layers.LSTM(width, unroll=unroll), layers.Dense(classes)], name)


@keras.saving.register_keras_serializable(package="keras_curvature")
class TokenAndPosition(layers.Layer):
    """Learned token plus position embeddings, `E[token] + P[position]`: (batch, length) -> (batch, length, width)."""

    def __init__(self, vocabulary, length, width, **options):
        super().__init__(**options)
        self.vocabulary, self.length, self.width = vocabulary, length, width
        self.tokens = layers.Embedding(vocabulary, width, dtype=self.dtype_policy, name="tokens")

    def build(self, input_shape):
        self.tokens.build(input_shape)
        self.places = self.add_weight(shape=(self.length, self.width), initializer="uniform", name="places")

    def call(self, x):
        return self.tokens(x) + ops.cast(self.places, self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_curvature")
class SparseNormal(keras.initializers.Initializer):
    """Sparse initialization: each unit has `incoming` weights from `N(0, stddev^2)`, and the others are zero.

    The size of a unit's input then does not depend on the width of the layer below, and units differ from each other.
    The last axis of a kernel counts the units.

    Reference: Martens, "Deep learning via Hessian-free optimization" (2010), section 5.

    Args:
        incoming: Number of non-zero weights of each unit; all weights, if there are fewer. Defaults to `15` (Martens).
        stddev: Standard deviation of the non-zero weights. Defaults to `1.0` (Sutskever et al.
            2013).
        seed: An integer; `None`: a random one, as in Keras' initializers. Defaults to `None`.

    Example:

    >>> layer = keras.layers.Dense(500, activation="sigmoid", kernel_initializer=SparseNormal())
    """

    def __init__(self, incoming: int = 15, stddev: float = 1.0, seed: int | None = None) -> None:
        if incoming < 1:
            raise ValueError(f"`SparseNormal`: `incoming` must be at least 1. Received: incoming={incoming}")
        self.incoming, self.stddev, self.seed = incoming, stddev, seed
        self._drawn = random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape: Shape, dtype: str | None = None) -> tf.Tensor:
        dtype = dtype or keras.config.floatx()
        flat = (math.prod(shape[:-1]), shape[-1])  # (incoming, units)
        values = keras.random.normal(flat, stddev=self.stddev, dtype=dtype, seed=self._drawn)
        lottery = keras.random.uniform(flat, seed=self._drawn + 1)
        rank = ops.argsort(ops.argsort(lottery, axis=0), axis=0)  # a random permutation in every column
        return ops.reshape(values * ops.cast(rank < self.incoming, dtype), shape)

    def get_config(self) -> Config:
        return {"incoming": self.incoming, "stddev": self.stddev, "seed": self.seed}


def _sparse_dense(width, activation):
    return layers.Dense(width, activation=activation, kernel_initializer=SparseNormal())


def _chain(shape, stack, name):
    inputs = keras.Input(shape)
    outputs = inputs
    for layer in stack:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name=name)
