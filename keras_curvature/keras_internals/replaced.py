"""The functions and attributes that the package replaces, each as `(owner, name)`; see `guards.py`.

| private name | constant | replaced in | why |
| --- | --- | --- | --- |
| `nn._compute_moments` | `MOMENTS` | `pure/differentiable.py` | second derivatives |
| `nn._compute_moments_sync` | `SYNCHRONIZED_MOMENTS` | `pure/differentiable.py` | derivatives over replicas |
| `nn.max_pool` | `MAX_POOL` | `pure/differentiable.py` | a cheap forward mode, also under XLA |
| `rnn.cudnn_ok` | `CUDNN_OK` | `pure/differentiable.py` | cuDNN has no second derivative |
| `loss.scale_loss_for_distribution` | `SCALE_LOSS` | `pure/differentiable.py` | uneven slices |
| `loss.reduce_weighted_values` | `REDUCE_LOSS` | `pure/differentiable.py` | means over weights, losses of one number |
| `loss.unscale_loss_for_distribution` | `UNSCALE_LOSS` | `pure/differentiable.py` | uneven slices |
| `FuncGraph.control_dependencies` | `CONTROL_DEPENDENCIES` | `pure/differentiable.py` | an unused backward pass |
| `gen_stateless_random_ops_v2.*` | `GENERATORS`, `TRUNCATED_NORMAL` | `pure/randomness.py` | rows of a slice |
| `Layer._dtype_policy` | `DTYPE_POLICY` | `pure/precision.py` | measures in float32 |
| `RNN.inner_loop`, of `LSTM`, `GRU` | `RECURRENT_LOOPS` | `layers/taps.py` | records the states |
| `call` of a class of layers | `method_of(layer, name)` | `layers/taps.py` | records the pre-activations |
| `TensorFlowTrainer.fit` | `epochs.FIT` | `callbacks/fits.py` | runs clean-up if `fit` fails |
| `TFEpochIterator.__init__` | `epochs.NEW_ITERATOR` | `callbacks/fits.py` | the iterator of a `fit` |
| `TFEpochIterator._enumerate_iterator` | `epochs.STEPS_OF_EPOCH` | `callbacks/fits.py` | the steps of an epoch |
| `gradient_registry.lookup` | `LOOKUP`, `GRADIENT_REGISTRY` | `pure/differentiability.py` | missing derivatives |
| `gen_functional_ops.symbolic_gradient` | `SYMBOLIC_GRADIENT` | `pure/differentiability.py` | refuses at trace time |
| `nn.ctc_loss` | `CTC_LOSS` | `pure/differentiable.py` | no second derivatives |
| `math_ops.matmul` | `MATMUL` | `pure/matmul.py` | wrong numbers by oneDNN |
| `interim.maybe_merge_call` | `MERGE_CALL` | `replicas.py` | Keras' step outside replicas |
| `TFOptimizer._all_reduce_sum_gradients` | `SUM_GRADIENTS` | `replicas.py` | the gradients are summed already |
"""

import importlib

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import nn
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.losses import loss
from tensorflow.python.framework import ops
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops import gen_functional_ops, math_ops
from tensorflow.python.ops import gen_stateless_random_ops_v2 as generators

# `import ... as` would return the function of the same name, which shadows the module
rnn = importlib.import_module("keras.src.backend.tensorflow.rnn")

MOMENTS = (nn, "_compute_moments")
SYNCHRONIZED_MOMENTS = (nn, "_compute_moments_sync")
MAX_POOL = (nn, "max_pool")
CUDNN_OK = (rnn, "cudnn_ok")
SCALE_LOSS = (loss, "scale_loss_for_distribution")
REDUCE_LOSS = (loss, "reduce_weighted_values")
UNSCALE_LOSS = (loss, "unscale_loss_for_distribution")
CONTROL_DEPENDENCIES = (FuncGraph, "control_dependencies")
GENERATORS = tuple(
    (generators, name)
    for name in ("stateless_random_uniform_v2", "stateless_random_uniform_int_v2", "stateless_random_normal_v2")
)
TRUNCATED_NORMAL = (generators, "stateless_truncated_normal_v2")
DTYPE_POLICY = (keras.layers.Layer, "_dtype_policy")
RECURRENT_LOOPS = tuple((cls, "inner_loop") for cls in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU))
GRADIENT_REGISTRY = ops.gradient_registry
LOOKUP = (type(ops.gradient_registry), "lookup")
SYMBOLIC_GRADIENT = (gen_functional_ops, "symbolic_gradient")
CTC_LOSS = (nn, "ctc_loss")
MATMUL = (math_ops, "matmul")
MERGE_CALL = (tf.__internal__.distribute.interim, "maybe_merge_call")
SUM_GRADIENTS = (TFOptimizer, "_all_reduce_sum_gradients")


def method_of(layer, name):
    """`(class, name)` of a layer's method such as `call`: the class that defines it."""
    return next(cls for cls in type(layer).__mro__ if name in vars(cls)), name
