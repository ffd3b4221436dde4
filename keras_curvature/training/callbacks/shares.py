"""Variables with a different value on each replica, such as batch statistics that are not synchronized."""

import tensorflow as tf


class Shares:
    """The variables of a model that may have a different value on each replica; none with one replica.

    They are concatenated to one row per replica, `(replicas, entries)`, so that one collective reads all of them.

    Args:
        model: A built model.
        strategy: The distribution strategy.
    """

    def __init__(self, model, strategy):
        several = strategy.num_replicas_in_sync > 1
        floating = [v for v in model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating]
        self.strategy, self.variables = strategy, floating if several else []
        self._sizes = [int(v.shape.num_elements()) for v in self.variables]
        wide = any(v.dtype == "float64" for v in self.variables)
        self._dtype = tf.float64 if wide else tf.float32
        self._gather, self._assign = tf.function(self._gather_rows), tf.function(self._assign_row)

    def read(self):
        """The values on all replicas, `(replicas, entries)`; every process must call this."""
        with self.strategy.scope():
            return self._gather()

    def write(self, rows):
        """Assign each replica its row."""
        with self.strategy.scope():
            row = self.strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(rows[context.replica_id_in_sync_group], self._dtype)
            )
            self._assign(row)

    def _gather_rows(self):
        def row():
            return tf.concat([tf.cast(tf.reshape(v, [-1]), self._dtype) for v in self.variables], axis=0)[tf.newaxis]

        return self.strategy.gather(self.strategy.run(row), axis=0)

    def _assign_row(self, row):
        def assign(row):
            for v, part in zip(self.variables, tf.split(row, self._sizes)):
                v.assign(tf.cast(tf.reshape(part, v.shape), v.dtype))

        self.strategy.run(assign, args=(row,))
