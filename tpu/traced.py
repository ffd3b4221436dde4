"""The train step of `fit` as one replica's program for XLA: its text, what goes in, and which variables come out."""

import dataclasses
import functools
import re
import time

import keras
import models
import numpy as np
import tensorflow as tf
from methods import OPTIMIZERS
from one_replica import OneOfMany

import keras_curvature as kc

ALIAS = re.compile(r"parameter_number = (\d+) : i64}, output_index = array<i64: (\d+)>")


@dataclasses.dataclass(frozen=True)
class Step:
    """A traced train step.

    Attributes:
        text: The program, in the text of MLIR.
        model: The compiled Keras model.
        inputs: Specs of the arguments `x` and `y`.
        captured: The tensors that follow the arguments: values of variables, and constants.
        updates: `{output: captured}`: which of the program's results is the next value of which captured variable.
        seconds: That tracing took.
    """

    text: str
    model: keras.Model
    inputs: list
    captured: list
    updates: dict
    seconds: float


# Networks, `(model, loss, x, y)` with a batch of zeros.


def cnn(examples):
    """A classifier of digits: convolutions, batch statistics, dropout."""
    layers = [keras.layers.Conv2D(16, 3, strides=2), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    layers += [keras.layers.Conv2D(32, 3, strides=2, activation="relu"), keras.layers.Flatten()]
    layers += [keras.layers.Dense(64, "relu"), keras.layers.Dropout(0.1), keras.layers.Dense(10, dtype="float32")]
    return _classifier(keras.Sequential([keras.Input((28, 28, 1)), *layers]), tf.zeros((examples, 28, 28, 1)))


def resnet50(examples):
    """The network of the paper, 224 x 224 pixels."""
    return _classifier(models.build("resnet50", 224), tf.zeros((examples, 224, 224, 3), tf.uint8))


def transformer(examples, layers=4, width=512, heads=8, vocabulary=32000, length=128):
    """A decoder of 45 million weights over 128 tokens; learned positions, a head of its own."""
    tokens = keras.Input((length,), dtype="int32")
    positions = keras.layers.Embedding(length, width)(keras.ops.arange(length))
    x = keras.layers.Embedding(vocabulary, width)(tokens) + positions
    for _ in range(layers):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = keras.layers.Dense(4 * width, "gelu")(keras.layers.LayerNormalization()(x))
        x = x + keras.layers.Dense(width)(y)
    logits = keras.layers.Dense(vocabulary, dtype="float32")(keras.layers.LayerNormalization()(x))
    return _classifier(keras.Model(tokens, logits), tf.zeros((examples, length), tf.int32))


def problem(name, examples):
    """One of the package's test problems, such as those of `examples/benchmarks/step_cost.py`."""
    found = kc.problems.get(name)
    x, y = (np.asarray(array) for array in found.sample(examples))
    kind = tf.int32 if np.issubdtype(y.dtype, np.integer) else tf.float32
    return found.model(0), found.loss(), tf.zeros(x.shape), tf.zeros(y.shape, kind)


NETWORKS = {
    "cnn": cnn, "resnet50": resnet50, "transformer": transformer,
    # 98 million weights
    "transformer_100m": functools.partial(transformer, layers=12, width=768, heads=12, vocabulary=8192),
    "mlp": functools.partial(problem, "mlp"), "cnn_32": functools.partial(problem, "cnn"),
    "autoencoder": functools.partial(problem, "autoencoder"),
}  # fmt: skip


def _classifier(model, x):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, loss, x, tf.zeros(tuple(n or len(x) for n in model.output_shape[:-1]), tf.int32)


# Steps.


def traced(optimizer, network, replicas, per_replica_batch):
    """The `Step` of one of `replicas` replicas.

    Args:
        optimizer: A name in `methods.OPTIMIZERS`, or `(a function that makes one, whether the model is curved)`.
        network: A name in `NETWORKS`, or a function as those.
        replicas: How many.
        per_replica_batch: Examples of each.
    """
    make, curve = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    build = NETWORKS[network] if isinstance(network, str) else network
    strategy = OneOfMany(replicas)
    with strategy.scope():
        model, loss, x, y = build(per_replica_batch)
        model = kc.curved(model) if curve else model
        model.compile(make(), loss, jit_compile=False)  # the function around the step is compiled
        model._symbolic_build(data_batch=(x, y, None))  # as `fit` does before its first step
        model.make_train_function()  # a curved model creates its reports by this

    @tf.function(jit_compile=True, autograph=False)
    def step(x, y):
        return strategy.run(model.train_step, args=((x, y),))

    began = time.perf_counter()
    captured = list(step.get_concrete_function(x, y).captured_inputs)
    program = step.experimental_get_compiler_ir(x, y)(stage="hlo_serialized")
    text = in_mlir(program)
    # results that are variables: their number, and that of the argument whose place they take
    updates = {int(output): int(argument) - 2 for argument, output in ALIAS.findall(text)}
    inputs = [tf.TensorSpec(a.shape, a.dtype) for a in (x, y)]
    return Step(text, model, inputs, captured, updates, time.perf_counter() - began)


def in_mlir(program):
    """A serialized HLO program in the text of MLIR."""
    from jax._src.lib import xla_client

    return xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))
