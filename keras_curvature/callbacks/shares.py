"""What every replica keeps for itself: batch statistics that are not synchronized."""

import tensorflow as tf


def own(model, strategy):
    """The variables of which each replica may have another value; none where there is one replica."""
    if strategy.num_replicas_in_sync == 1:
        return []
    return [v for v in model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating]


def gathered(strategy, variables):
    """For each variable a tensor (replicas, ...) of what the replicas hold; every process must call this."""

    @tf.function
    def gather():
        held = strategy.run(lambda: [tf.convert_to_tensor(v)[tf.newaxis] for v in variables])
        return [strategy.gather(value, axis=0) for value in held]

    with strategy.scope():
        return gather() if variables else []


def give_back(strategy, variables, tables):
    """Give each replica its row of the tables."""

    @tf.function
    def assign(rows):
        strategy.run(lambda rows: [v.assign(row) for v, row in zip(variables, rows)] and None, args=(rows,))

    def rows_of(context):
        return [tf.constant(table[context.replica_id_in_sync_group]) for table in tables]

    with strategy.scope():
        assign(strategy.experimental_distribute_values_from_function(rows_of))
