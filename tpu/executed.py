"""A traced train step on the devices of JAX: the same program that a TPU's compiler gets, run where there is no TPU.

XLA_FLAGS=--xla_force_host_platform_device_count=4    # before JAX is imported: four devices of the CPU
"""

import os

os.environ["JAX_ENABLE_X64"] = "1"  # counters are of 64 bits

import numpy as np
import tensorflow as tf
from compiler import load, without_a_tpu

from keras_curvature.training.reports import reported_of

without_a_tpu()


class Execution:
    """A training by a step's program, beside the model that it was traced from, which stays as it is.

    Args:
        step: A `Step` of as many replicas as there are devices.
        devices: Of JAX, such as `jax.devices("cpu")[:4]`.
    """

    def __init__(self, step, devices):
        import jax

        self._step, self._jax = step, jax
        self._program = load(step.text, devices, devices[0].client)
        mesh = jax.sharding.Mesh(np.array(devices), ("replicas",))
        self._everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("replicas"))
        self._variables = {id(v.value.handle): v for v in variables(step.model)}
        self._values = [jax.device_put(self._value(t), self._everywhere) for t in step.captured]

    def _value(self, tensor):
        return self._variables[id(tensor)].numpy() if tensor.dtype == tf.resource else tensor.numpy()

    def take(self, x, y):
        """Take a step on a batch, of which each replica gets its share of the rows."""
        given = [self._jax.device_put(np.asarray(a), self._cut) for a in (x, y)]
        results = self._program.execute_sharded([*given, *self._values]).disassemble_into_single_device_arrays()
        for output, captured in self._step.updates.items():
            parts = results[output]
            self._values[captured] = self._jax.make_array_from_single_device_arrays(
                parts[0].shape, self._everywhere, parts
            )

    def of_replicas(self, variable):
        """The value of a Keras variable on each replica, a list of arrays."""
        (captured,) = (i for i, t in enumerate(self._step.captured) if self._variables.get(id(t)) is variable)
        return [np.asarray(part.data) for part in self._values[captured].addressable_shards]


def variables(model):
    """All Keras variables of a training: weights, seeds, state of the optimizer, metrics, reports."""
    found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    reported = reported_of(model)
    return found + (reported.variables if reported is not None else [])
