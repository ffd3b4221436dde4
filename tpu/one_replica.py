"""A strategy for one replica's program out of many, whose sums over the replicas are XLA's own collectives.

Under `tf.distribute.TPUStrategy` TensorFlow hands a TPU one program for all replicas. Here such a program is made
without a TPU: what is traced in the scope of `OneOfMany(n)` is the program of one of `n` replicas, for XLA to compile
for as many chips. Methods and models do not know of it: they see a strategy without merge calls, as on a TPU.
"""

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.python.distribute import one_device_strategy


class OneOfMany(tf.distribute.OneDeviceStrategy):
    """One of `replicas` replicas in sync; trace under it, with `jit_compile`; one of several cannot run so.

    Args:
        replicas: How many there are, an integer.
    """

    def __init__(self, replicas):
        super().__init__("CPU:0")
        self._extended = _Extended(self, replicas)


class _Extended(one_device_strategy.OneDeviceExtended):
    """What TensorFlow asks a strategy."""

    def __init__(self, strategy, replicas):
        super().__init__(strategy, "CPU:0")
        self._replicas = replicas

    @property
    def _num_replicas_in_sync(self):
        return self._replicas

    def _use_merge_call(self):
        return False

    @property
    def _retrace_functions_for_each_device(self):
        return False

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        if self._replicas == 1:
            return value
        everybody = [list(range(self._replicas))]
        share = self._replicas if reduce_op == tf.distribute.ReduceOp.MEAN else 1

        def summed(tensor):
            total = gen_xla_ops.xla_all_reduce(
                input=tensor, group_assignment=everybody, reduce_op="Add", mode="CrossReplica"
            )
            return total / tf.cast(share, total.dtype) if share > 1 else total

        return tf.nest.map_structure(summed, value)

    def _call_for_each_replica(self, fn, args, kwargs):
        strategy = self._container_strategy()
        with tf.device(self._device), _Replica(strategy):
            return fn(*args, **kwargs)


class _Replica(tf.distribute.ReplicaContext):
    """A replica that learns its number when it runs."""

    def __init__(self, strategy):
        super().__init__(strategy, replica_id_in_sync_group=0)

    @property
    def replica_id_in_sync_group(self):
        return xla.replica_id() if self.strategy.num_replicas_in_sync > 1 else 0

    @property
    def devices(self):
        return ("CPU:0",)
