"""Sums over replicas: the only file of the package that uses `tf.distribute`. No mathematics.

Under a distribution strategy a batch is cut into one slice per replica. Activations, outputs and tapes of a slice stay
on its replica. A method works with sums over the replicas: gradients, curvature products, inner products. It uses three
functions:

    `cross(fn, *args)`   leave the replicas: run `fn` once for all of them
    `each(fn, *args)`    run `fn` on every replica; the results stay there
    `total(fn, *args)`   run `fn` on every replica and sum the results

Some strategies synchronize by merge calls (`MirroredStrategy` on CPUs, `MultiWorkerMirroredStrategy`). They refuse a
collective inside a `tf.while_loop` or `tf.cond` of a replica, but allow a loop *around* the replicas. So `cross` comes
first, and the loops of conjugate gradients run outside. On strategies without merge calls (TPUs, and the default
strategy) `cross` does not leave the replica, and `total` is an `all_reduce`.
"""

import concurrent.futures
import contextlib
import contextvars

import tensorflow as tf

from keras_curvature import keras_internals
from keras_curvature.keras_internals import replaced


def uses_merge_calls():
    """Whether the strategy synchronizes by merge calls, so that loops and conditions must run outside the replicas.

    Not on TPUs: all replicas there run one program, whose loops may contain sums, and `strategy.run` cannot be nested.
    TensorFlow says that its `TPUStrategy` uses merge calls, because the class does not answer the question.
    """
    return keras_internals.uses_merge_calls() and not isinstance(tf.distribute.get_strategy(), _OF_TPUS)


_OF_TPUS = (tf.distribute.TPUStrategy, tf.distribute.experimental.TPUStrategy)


def of_several_workers(strategy):
    """Whether `strategy` trains in several processes, each with replicas of its own."""
    mirrored = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return mirrored and keras_internals.has_several_workers(strategy)


def is_iterator(data):
    """Whether `data` is an iterator over the batches of a data set, for one replica or for several."""
    return isinstance(data, (tf.data.Iterator, tf.distribute.DistributedIterator))


def one_of(strategy, values):
    """The values of one replica of this worker, from a nest of per-replica values."""
    return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], values)


def read(variable):
    """The value of a variable in Python numbers, lists of them for a vector; also for a mirrored variable."""
    return tf.convert_to_tensor(variable).numpy().tolist()


def whole(strategy, values):
    """The rows of all replicas of this worker, one replica after the other, from a nest of per-replica values.

    Missing parts of a batch, for which Keras passes an empty `tf.experimental.Optional`, are `None`.
    """

    def rows(value):
        parts = [part for part in strategy.experimental_local_results(value) if tf.is_tensor(part)]
        return parts[0] if len(parts) == 1 else tf.concat(parts, 0) if parts else None

    return tf.nest.map_structure(rows, values)


def strangers(strategy, variables):
    """The Keras variables that were not created under `strategy`, which cannot train them."""
    return [v for v in variables if not strategy.extended.variable_created_in_scope(v.value)]


def count():
    """Number of replicas in sync, a Python integer."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def here():
    """Number of replicas in sync if the caller is one of them, else 1."""
    return 1 if tf.distribute.get_replica_context() is None else count()


def cross(fn, *args):
    """Run `fn(*args)` once for all replicas. `args` are this replica's values; `fn` gets the values of all.

    If a tensor is the same Python object on all replicas, `merge_call` treats it as a single value, and a sum over the
    replicas would count it once. So each replica passes its own copies.
    """
    context = tf.distribute.get_replica_context()
    if context is None or not uses_merge_calls():
        return fn(*args)
    own = tf.nest.map_structure(lambda value: tf.identity(value) if isinstance(value, tf.Tensor) else value, args)
    return context.merge_call(lambda strategy, *args: fn(*args), args=own)


# per thread: another may be training a plain model
_outside = contextvars.ContextVar("outside", default=False)


@contextlib.contextmanager
def keras_outside():
    """While open, Keras' optimizers work outside the replicas, on summed gradients.

    Keras leaves the replicas by one merge call for each action of an optimizer. Strategies refuse a merge call inside a
    `tf.cond` (accumulated gradients, averages of the weights). Outside the replicas none is needed.
    """
    keras_internals.guard(*replaced.MERGE_CALL, _maybe_merge_call)
    keras_internals.guard(*replaced.SUM_GRADIENTS, _sum_gradients)
    with keras_internals.holding(_outside, True):
        yield


def _maybe_merge_call(original, fn, strategy, *args, **kwargs):
    if _outside.get() and tf.distribute.in_cross_replica_context():
        return fn(strategy, *args, **kwargs)
    return original(fn, strategy, *args, **kwargs)


def _sum_gradients(original, optimizer, grads_and_vars):
    return grads_and_vars if _outside.get() else original(optimizer, grads_and_vars)


def each(fn, *args):
    """Run `fn(*args)` on every replica; the result stays there and can be an argument of `each` or `total`.

    The replicas see the caller's context variables, although a strategy may run each replica in its own thread. Context
    variables set on a replica stay on that replica.
    """
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        return tf.distribute.get_strategy().run(_in_this_context(fn), args=args)
    return fn(*args)


def _in_this_context(fn):
    """`fn`, to be called in other threads, each in a copy of the context variables that are set now."""
    here = contextvars.copy_context()

    def run(*args):
        return here.copy().run(fn, *args)  # two threads cannot be in one context

    return run


def outside_of_graphs(fn, *args):
    """`fn(*args)`, run eagerly even while a graph is being traced, unless a strategy is active.

    A variable that is created during the trace of a `tf.function` costs a condition for its first value, and makes
    TensorFlow trace the whole function again. `tf.init_scope` does not change this: the function still sees the
    variable. Another thread is outside the trace.
    """
    if tf.executing_eagerly() or tf.distribute.has_strategy():
        return fn(*args)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(contextvars.copy_context().run, fn, *args).result()


def total(fn, *args):
    """The sum over replicas of `fn(*args)`, a nest of tensors, the same on all of them."""
    return add_up(each(fn, *args))


def add_up(values):
    """Sum a nest of per-replica tensors over the replicas."""
    if count() == 1:
        return values
    strategy, context = tf.distribute.get_strategy(), tf.distribute.get_replica_context()
    if context is None:
        # all at once, so that the strategy packs them; the destination is their own devices, because a sum for a single
        # device would be gathered there without collectives
        parts = [(value, value) for value in tf.nest.flatten(values)]
        sums = strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, parts)
        return one_of(strategy, tf.nest.pack_sequence_as(values, sums))
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def gather(rows, at=None):
    """The rows (axis 0) of a per-replica tensor, one replica after the other, the same on all of them.

    `at`: what `place` says of the rows; without it, `gather` asks.
    """
    if count() == 1:
        return rows
    start, whole = place(lambda a: tf.shape(a)[0] if a.shape[0] is None else a.shape[0], rows) if at is None else at
    lengths = _lengths(rows)

    def among_all(rows, start):
        own, static = tf.shape(rows)[0] if rows.shape[0] is None else rows.shape[0], rows.shape[1:]
        if lengths is not None:
            rows = tf.reshape(rows, tf.concat([[own], lengths], 0))
            static = [n or None for n in static]  # 0: of a replica without rows
        padded = tf.pad(rows, [[0, whole - own]] + [[0, 0]] * (rows.shape.rank - 1))
        placed = tf.roll(padded, start, 0)
        return tf.ensure_shape(placed, [whole if isinstance(whole, int) else None, *static])

    return total(among_all, rows, start)


def _lengths(rows):
    """The lengths of all axes but the first, a vector; `None` where static shapes show them.

    A replica without rows may not know them, such as how many positions an example has: they are those of the others.
    """
    noted = {}

    def note(rows):
        noted[identity()] = tuple(rows.shape[1:])
        return tf.one_hot(number(), count(), dtype=tf.int32)[:, tf.newaxis] * tf.shape(rows)[1:]

    lengths = each(note, rows)
    static = _noted_by_all(noted)
    return None if static is not None and None not in static else tf.reduce_max(add_up(lengths), 0)


def _noted_by_all(noted):
    """What every replica has noted, if it is the same."""
    static, *others = noted.values()
    # in a graph, a known shape here is the same in every worker's graph
    complete = len(noted) == count() or not tf.executing_eagerly()
    return static if complete and all(other == static for other in others) else None


@tf.custom_gradient
def add_up_inside(value):
    """The sum over the replicas of an intermediate tensor that all of them compute, such as a mean of the batch.

    Its derivatives of any order are sums over the replicas too. TensorFlow's own sum can only be differentiated in the
    call of `each` that recorded it.
    """
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value), add_up_inside


def place(fn, *args):
    """The place of each replica's examples in the whole batch: `(start, total)`.

    `fn(*args)` runs on every replica and returns the number of its examples. `start` is the number of examples before
    them; it stays on the replica and can be an argument of `each`. `total` is the number of all examples. If static
    shapes show equal numbers on all replicas, nothing is communicated; otherwise one integer per replica is.
    """
    noted = {}

    def note(*args):
        examples = fn(*args)
        noted[identity()] = examples if isinstance(examples, int) else None
        return tf.one_hot(number(), count(), dtype=tf.int32) * examples

    if count() == 1:
        return 0, fn(*args)
    lengths = each(note, *args)
    static = _noted_by_all(noted)
    if isinstance(static, int):
        return each(lambda: number() * static), count() * static
    lengths = add_up(lengths)  # (replicas,)
    return each(lambda: tf.cumsum(lengths, exclusive=True)[number()]), tf.reduce_sum(lengths)


def number():
    """The caller's number among the replicas in sync, an integer or tensor; call it inside `each`."""
    context = tf.distribute.get_replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


def identity():
    """A key for Python objects that belong to one replica, such as its gradient tape; call it inside `each`."""
    own = number()
    static = own if isinstance(own, int) else tf.get_static_value(own)
    return 0 if static is None else int(static)  # a TPU traces one program for all its replicas


def on_each_copy(variable, fn, *args):
    """`fn(copy, *args)` for the copy of a variable on every device, where the operation has no form for all of them."""
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        tf.distribute.get_strategy().extended.update(variable, fn, args=args, group=False)
    else:
        fn(variable, *args)


def strategy_of(model):
    """The strategy that a Keras model was made under, or the default strategy.

    Raises:
        ValueError: It trains in several processes.
    """
    strategy = model.distribute_strategy
    if of_several_workers(strategy):
        raise ValueError(
            f"Curvature is measured in one process. Received: the model {model.name!r}, made under "
            f"`{type(strategy).__name__}` on {strategy.num_replicas_in_sync} replicas of several workers. Save it, and "
            "measure it in a process of its own: `keras_curvature.curvature(keras.models.load_model(path), data)`."
        )
    return strategy
