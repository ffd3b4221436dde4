"""Private names of TensorFlow."""

import tensorflow as tf
from tensorflow.python.framework import op_def_registry, tensor_util
from tensorflow.python.ops import control_flow_util


def static_shape(shape):
    """The static `tf.TensorShape` of a shape that is a tensor, with `None` for unknown axes."""
    return tensor_util.constant_value_as_shape(tf.convert_to_tensor(shape))


def is_compiled():
    """Whether XLA compiles what is being traced; not in eager execution."""
    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def uses_merge_calls():
    """Whether the current distribution strategy synchronizes its replicas by merge calls."""
    return not tf.__internal__.distribute.strategy_supports_no_merge_call()


def has_several_workers(strategy):
    """Whether a `MultiWorkerMirroredStrategy` has more than one worker."""
    return strategy.extended._in_multi_worker_mode()


# `DataType` numbers: float32, float64, complex64, bfloat16, complex128, float16, and variants (lists of tensors)
_CONTINUOUS = {1, 2, 8, 14, 18, 19, 21}


def is_continuous(operation):
    """Whether an operation, given by its type, can have floating-point inputs and floating-point outputs."""
    definition = op_def_registry.get(operation)
    if definition is None:
        return True
    allowed = {a.name: set(a.allowed_values.list.type) or _CONTINUOUS for a in definition.attr}

    def has_floats(arguments):
        kinds = [{a.type % 100} if a.type else allowed.get(a.type_attr or a.type_list_attr, set()) for a in arguments]
        return any(kind & _CONTINUOUS for kind in kinds)

    return has_floats(definition.input_arg) and has_floats(definition.output_arg)
