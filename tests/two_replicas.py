"""Trains with the optimizers named on the command line on one device and on two replicas; prints the losses as JSON.

Run by `test_properties.py` in a process of its own.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf
from optimizers import PLAIN, prepare

import keras_curvature as kc

BATCH, BATCHES = 8, 4


def trained(name, x, y):
    """The loss after each batch and the last reports; of a plain model the weights that are left.

    The last batch of a curved model has one example, so that a replica has none. (Of a plain model Keras would weight
    the replicas alike.) Its running loss is that of the whole epoch, since Keras shows the mean over the replicas.
    """
    keras.utils.set_random_seed(0)
    model, optimizer = prepare(name, keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(3),
    ]))  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    seen = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    history = model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[note]).history
    reports = {key: values[-1] for key, values in history.items() if key != "loss"}
    # a plain model reports nothing, and is left with other weights than it was trained with
    left = [] if reports else np.concatenate([w.ravel() for w in model.get_weights()])
    losses = [*seen[:BATCHES], history["loss"][-1]]
    return [*map(float, losses), *[float(reports[key]) for key in sorted(reports)], *map(float, left)]


class Counted(keras.layers.Layer):
    """Counts how often it runs, on all replicas together."""

    runs = 0

    def call(self, inputs):
        """`inputs`, unchanged."""

        def note():
            Counted.runs += 1

        with tf.control_dependencies([tf.py_function(note, [], [])]):
            return tf.identity(inputs)


def forward_passes(x, y):
    """Of CurveBall, which looks at its damping in every third step, after each step."""
    keras.utils.set_random_seed(0)
    model = kc.curved(keras.Sequential([keras.Input((4,)), Counted(), keras.layers.Dense(3)]))
    optimizer = kc.CurveBall(damping=kc.LevenbergMarquardt(every=3))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    seen, Counted.runs = [], 0
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(Counted.runs))
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[note])
    return np.diff([0, *seen]).tolist()


def decayed():
    """After an epoch of AdamW: the weight of a layer that the loss does not reach, and one that it does."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    heads = {"value": keras.layers.Dense(3, name="value")(inputs), "idle": keras.layers.Dense(2, name="idle")(inputs)}
    model = kc.curved(keras.Model(inputs, heads))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), {"value": loss}, jit_compile=False)
    x = np.random.default_rng(0).standard_normal((BATCH, 4)).astype("float32")
    before = model.get_layer("idle").kernel.numpy()
    model.fit(x, {"value": np.argmax(x[:, :3], axis=1)}, batch_size=BATCH, epochs=2, verbose=0)
    idle = model.get_layer("idle").kernel.numpy()
    return [float(np.abs(idle - before).max()), *model.get_layer("value").kernel.numpy().ravel().tolist()]


def normalized(synchronized):
    """A model with batch statistics; equal weights every time."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(synchronized=synchronized),
        layers.Activation("tanh"), layers.Dense(3),
    ])  # fmt: skip


def weights_by_hand(x, y, slices):
    """After one step of gradient descent on the mean over slices, each with statistics of its own; plain TensorFlow."""
    model = normalized(False)
    with tf.GradientTape() as tape:
        losses = []
        for rows in np.split(np.arange(BATCH), slices):
            log_p = tf.nn.log_softmax(model(x[:BATCH][rows], training=True))
            losses.append(-tf.reduce_mean(tf.gather(log_p, y[:BATCH][rows], batch_dims=1)))
        loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, [w.value for w in model.trainable_variables])
    return np.concatenate([(w.numpy() - 0.5 * g.numpy()).ravel() for w, g in zip(model.trainable_variables, gradients)])


def weights_after_a_step(x, y, synchronized):
    """The same, by a curved model under the strategy of the caller."""
    model = kc.curved(normalized(synchronized))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, jit_compile=False)
    model.fit(x[:BATCH], y[:BATCH], batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return np.concatenate([w.numpy().ravel() for w in model.trainable_variables])


def by_hand():
    """The weights after two steps of a hand-written loop, whose gradient is one tensor object on all replicas."""
    strategy = tf.distribute.get_strategy()
    weights, optimizer = keras.Variable(np.ones(3, "float32")), kc.Neumann(0.1)
    optimizer.build([weights])
    gradient = tf.constant([1.0, 2.0, -3.0]) / strategy.num_replicas_in_sync

    def step():
        strategy.run(lambda: optimizer.apply([gradient], [weights]))

    step()  # as it stands, and as a graph
    tf.function(step, autograph=False)()
    return weights.numpy().tolist()


DECOMPOSITIONS = ("SelfAdjointEigV2", "Qr", "Cholesky")
DECOMPOSING = ("shampoo", "soap", "kfac", "ekfac")


def decompositions(name, x, y):
    """How many decompositions of (stacks of) matrices stand in the graph of a step, `{device: count}`."""
    keras.utils.set_random_seed(0)
    model, optimizer = prepare(name, keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(6), keras.layers.Dense(3),
    ]))  # fmt: skip
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    optimizer.build(model.trainable_variables)
    strategy = tf.distribute.get_strategy()

    @tf.function(autograph=False)
    def step(x, y):
        return strategy.run(model.train_step, [(x, y)])

    graph = step.get_concrete_function(x[:BATCH], y[:BATCH]).graph.as_graph_def()
    found = {}
    for function in [graph.node, *[f.node_def for f in graph.library.function]]:
        for node in function:
            if node.op in DECOMPOSITIONS:
                found[node.device[-5:]] = found.get(node.device[-5:], 0) + 1
    return found


def main(names):
    """Prints `{name: {"one": numbers, "two": numbers}}`."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x = np.random.default_rng(0).standard_normal((BATCH * BATCHES + 1, 4)).astype("float32")
    y = np.argmax(x[:, :3], axis=1).astype("int32")
    uneven, (x, y) = (x, y), (x[:-1], y[:-1])
    results = {"forward passes": {"one": forward_passes(x, y)}}
    with strategy.scope():
        results["forward passes"]["two"] = forward_passes(x, y)
    results["by hand"] = {"one": by_hand()}
    with strategy.scope():
        results["by hand"]["two"] = by_hand()
    results["decayed"] = {"one": decayed()}
    with strategy.scope():
        results["decayed"]["two"] = decayed()
    for key, slices in (("each replica's", 2), ("synchronized", 1)):
        with strategy.scope():
            two = weights_after_a_step(x, y, synchronized=slices == 1)
        results[key] = {"hand": weights_by_hand(x, y, slices).tolist(), "two": two.tolist()}
    for name in names:
        try:
            batches = (x, y) if name in PLAIN else uneven
            one = trained(name, *batches)
            with strategy.scope():
                results[name] = {"one": one, "two": trained(name, *batches)}
            if name in DECOMPOSING:
                one = decompositions(name, x, y)
                with strategy.scope():
                    results[name]["decompositions"] = {"one": one, "two": decompositions(name, x, y)}
        except Exception as error:  # the others shall run all the same
            results[name] = {"error": f"{type(error).__name__}: {error}"[-1500:]}
    print(json.dumps(results))


main(sys.argv[1:])
