"""The real `tf.distribute.TPUStrategy` over a TPU that is not there: steps are traced under it, and cannot run.

TensorFlow asks a cluster resolver which devices a TPU has, and the TPU itself only when a program runs. So a resolver
that names devices suffices to trace: what Keras' `fit`, `evaluate` and `predict` would run on a TPU becomes a graph.
"""

import collections
import dataclasses
import inspect

import tensorflow as tf
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a made-up TPU: its full name."""

    name: str

    @property
    def device_type(self):
        """Such as `"TPU"`."""
        return self.name.split(":")[-2]


class Resolver(tf.distribute.cluster_resolver.ClusterResolver):
    """Answers for a TPU with `cores` cores on one host."""

    def __init__(self, cores):
        self.cores, self.task_type, self.task_id = cores, "worker", 0

    def get_tpu_system_metadata(self):
        host = "/job:localhost/replica:0/task:0/device:"
        names = ["CPU:0", *[f"TPU:{core}" for core in range(self.cores)], "TPU_SYSTEM:0"]
        return TPUSystemMetadata(
            num_cores=self.cores, num_hosts=1, num_of_cores_per_host=self.cores, topology=None,
            devices=[Device(host + name) for name in names],
        )  # fmt: skip

    def cluster_spec(self):
        return tf.train.ClusterSpec({})

    def master(self, *args, **kwargs):
        return ""

    def num_accelerators(self, *args, **kwargs):
        return {"TPU": self.cores}


def strategy(cores):
    """A `TPUStrategy` with a replica on each of `cores` cores."""
    return tf.distribute.TPUStrategy(Resolver(cores))


# What Keras would run.


# operations that leave the TPU for the host, or send it something
HOST = {"PyFunc", "EagerPyFunc", "PyFuncStateless", "Print", "PrintV2", "XlaHostCompute", "XlaSendToHost"}
RESOURCES = (tf.resource, tf.variant)


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function of Keras', as far as it is for a TPU.

    Attributes:
        sums: How many tensors are summed over the replicas.
        operations: `{type: how many}`.
        hosts: Types of the operations that call the host.
        unknown: Names of the tensors whose shape is not known while tracing, and not made of constants.
        doubles: Names of the tensors of float64 that hold more than `FEW` numbers; a TPU emulates float64.
        traces: How often TensorFlow traced the function.
    """

    sums: int
    operations: dict
    hosts: list
    unknown: list
    doubles: list
    traces: int


FEW = 32  # numbers: scalars of a step, systems of two equations, a counter for each variable


def program(model, function, *args, **kwargs):
    """The `Program` of `model.fit`, `evaluate` or `predict`, which is called and ends where a TPU would run.

    Args:
        model: The compiled model.
        function: `"fit"`, `"evaluate"` or `"predict"`.
        *args, **kwargs: Its arguments.
    """
    try:
        getattr(model, function)(*args, verbose=0, **kwargs)
    except tf.errors.InvalidArgumentError as error:
        if "No OpKernel was registered to support Op 'TPURepl" not in str(error):
            raise
    else:
        raise RuntimeError(f"`{function}` ran without a TPU")
    traces = _traced(model, function)._list_all_concrete_functions()
    return read(traces[-1].graph, len(traces))


def _traced(model, function):
    """The `tf.function` of a model's training, evaluation or prediction."""
    if function == "predict":
        return model.predict_function
    function = model.train_function if function == "fit" else model.test_function
    function = getattr(function, "_function", function)  # curved models wrap it
    return inspect.getclosurevars(function).nonlocals["multi_step_on_iterator"]


def read(graph, traces=1):
    """The `Program` in a graph: the operations of `strategy.run`, and of the functions that they call."""
    found = list(_for_tpus(graph))
    kinds = collections.Counter(op.type for op in found)
    # a loop hands all its variables to its condition, which uses a few of them
    used = [t for op in found for t in op.outputs if "redundant_placeholder" not in t.name]
    tensors = [t for t in used if t.dtype not in RESOURCES]
    return Program(
        sums=kinds["CrossReplicaSum"],
        operations=dict(kinds),
        hosts=sorted(HOST & set(kinds)),
        unknown=[t.name for t in tensors if not t.shape.is_fully_defined() and not _is_shaped_by_constants(t.op)],
        doubles=[t.name for t in tensors if t.dtype == tf.float64 and _may_be_many(t.shape)],
        traces=traces,
    )


def _may_be_many(shape):
    """Whether a tensor has more than `FEW` numbers, or a shape that is not known."""
    return not shape.is_fully_defined() or shape.num_elements() > FEW


def _is_shaped_by_constants(op):
    """Whether an operation's shape is one of its inputs, computed from constants and arguments of integers.

    Gradients of gradients of normalization hand such constants to an inner function, in which TensorFlow does not know
    them; `vectorized_map` computes the shape of a kernel's gradients. XLA knows them: it compiles a function where it
    is called (`test_xla.py` reads the shapes of the compiled steps).
    """
    if op.type not in ("Reshape", "Conv2DBackpropFilter"):
        return False
    waiting, seen = [op.inputs[1]], set()
    while waiting:
        tensor = waiting.pop()
        if not tensor.dtype.is_integer:
            return False
        if tensor.ref() not in seen and tensor.op.type not in ("Const", "Placeholder", "Shape", "ShapeN"):
            waiting.extend(tensor.op.inputs)
        seen.add(tensor.ref())
    return True


def _for_tpus(graph, inside=False):
    """The operations that `strategy.run` marks, and those of the functions that they call."""
    for op in graph.get_operations():
        own = inside or "_tpu_replicate" in op.node_def.attr
        if own:
            yield op
        for attribute in (a.name for a in op.op_def.attr if a.type == "func"):
            yield from _for_tpus(graph._get_function(op.get_attr(attribute).name).graph, own)
