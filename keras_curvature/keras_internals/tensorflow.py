"""Private names of TensorFlow."""

import tensorflow as tf
from tensorflow.python.framework import tensor_util
from tensorflow.python.ops import control_flow_util


def static_shape(shape):
    """What is known of a shape that is given as a tensor, a `tf.TensorShape`."""
    return tensor_util.constant_value_as_shape(tf.convert_to_tensor(shape))


def is_compiled(graph):
    """Whether a graph is traced for XLA."""
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def uses_merge_calls():
    """Whether the strategy of the caller synchronizes its replicas by merge calls."""
    return not tf.__internal__.distribute.strategy_supports_no_merge_call()


def has_several_workers(strategy):
    """Whether a `MultiWorkerMirroredStrategy` has more than one worker."""
    return strategy.extended._in_multi_worker_mode()
