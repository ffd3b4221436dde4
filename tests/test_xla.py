"""The whole train step of every optimizer as XLA compiles it, which is what a TPU runs.

On a TPU a program cannot call the host, and no shape in it may depend on a value. Compiled for the CPU, both can be
read from the program: callbacks and transfers are instructions with a name, and a shape with a bound (`f32[<=8]`) is
one that depends on a value.
"""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import OPTIMIZERS
from selection import some

import keras_curvature as kc

HOST = re.compile(r"\b(infeed|outfeed|send|recv|send-done|recv-done)\(")
# calls that the compiler itself replaces, on every device
OF_THE_COMPILER = {"Eigh", "Qr", "ProductOfElementaryHouseholderReflectors"}
# operations of TensorFlow that leave XLA, or whose outputs have as many elements as a value says; and `tf.switch_case`,
# whose index XLA tries to know in advance: if it comes from the gradient of a pooling layer, that logs pages of errors
NOT_FOR_XLA = {
    "PyFunc", "EagerPyFunc", "PyFuncStateless", "Print", "PrintV2", "Where", "Unique", "UniqueV2", "Assert", "Case",
    "StatelessCase",
}  # fmt: skip


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def compiled(name, micro_batches):
    """A small convolutional network with all that a step may stumble over."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((4, 4, 2)), layers.Conv2D(3, 2, activation="relu"), layers.BatchNormalization(),
        layers.MaxPooling2D(), layers.Flatten(), layers.Dropout(0.2), layers.Dense(3, dtype="float32"),
    ])  # fmt: skip
    kc.curved(model, micro_batches=micro_batches)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[name](), loss, metrics=["accuracy"], jit_compile=True)
    return model


def operations(graph):
    """The types of all operations of a graph and of the functions in it."""
    nodes = list(graph.as_graph_def().node)
    for function in graph.as_graph_def().library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


CASES = [
    *[(name, "float32", 1) for name in OPTIMIZERS],
    *[(name, "mixed_bfloat16", 1) for name in OPTIMIZERS],
    *[(name, "bfloat16", 1) for name in OPTIMIZERS],
    *[(name, "float32", 2) for name in OPTIMIZERS],
]
BY_DEFAULT = [("curveball", "bfloat16", 1)]


@pytest.mark.parametrize(("name", "policy", "micro_batches"), some(CASES, BY_DEFAULT), indirect=["policy"])
def test_the_whole_step_is_one_program_without_the_host(name, policy, micro_batches):
    model = compiled(name, micro_batches)
    random = np.random.default_rng(0)
    x, y = tf.constant(random.standard_normal((8, 4, 4, 2)), "float32"), tf.constant(random.integers(0, 3, 8))
    model.train_on_batch(x, y)  # creates all variables
    step = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True)
    graph = step.get_concrete_function(x, y).graph
    assert not operations(graph) & NOT_FOR_XLA
    program = step.experimental_get_compiler_ir(x, y)(stage="hlo")
    assert not HOST.search(program), HOST.search(program)
    assert set(re.findall(r'custom_call_target="(.*?)"', program)) <= OF_THE_COMPILER
    assert "<=" not in re.sub(r"metadata=\{.*?\}", "", program)
    before = model.get_weights()
    logs = step(x, y)
    assert np.isfinite(float(logs["loss"])) and float(logs["skipped_steps"]) == 0
    assert any(np.any(a != b) for a, b in zip(model.get_weights(), before))
