"""Everything a `Linearization` gives, on one device and on two replicas; prints the largest differences as JSON.

Run by `test_slices.py` in a process of its own, with cases such as `dropout:5:2`: a batch of 5 (3 + 2) in two
micro-batches on each replica; or `fit:9`: `fit`, with a batch of 1 (1 + 0) at the end of an epoch; or `ragged:7` and
`sparse:7`, of inputs that are not dense; or `probes:5`, what `keras_curvature.monitor.curvature` says of 5 examples; or
`report:13`, the numbers of a report.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf
from cases import flat, float64
from keras import layers

import keras_curvature as kc
from keras_curvature import Linearization
from keras_curvature.monitor.operator import curvature
from keras_curvature.monitor.report.measure import measure

KINDS = {
    "plain": lambda: [layers.Dense(3, kernel_regularizer="l2"), Idle()],
    "dropout": lambda: [layers.Dropout(0.5, seed=3)],
    "noise": lambda: [
        layers.GaussianNoise(0.3, seed=1), layers.GaussianDropout(0.3, seed=2), layers.AlphaDropout(0.3, seed=4),
    ],
    "recurrent_dropout": lambda: [
        layers.Reshape((5, 1)), layers.SpatialDropout1D(0.3, seed=3),
        layers.LSTM(3, dropout=0.3, recurrent_dropout=0.3, seed=5),
    ],
    "attention": lambda: [layers.Reshape((5, 1)), layers.Dense(4), Attends(), layers.Flatten()],
    "synchronized": lambda: [layers.BatchNormalization(synchronized=True, momentum=0.5)],
}  # fmt: skip


class Idle(layers.Layer):
    """Has a weight that is not used."""

    def build(self, input_shape):
        """Creates it."""
        self.add_weight((2,))

    def call(self, x):
        """`x`, unchanged."""
        return x


class Attends(layers.Layer):
    """Attention of a sequence to itself, with dropout."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 2, dropout=0.3, seed=3)

    def call(self, x):
        """`(batch, time, units)` to the same."""
        return self.attention(x, x)


def build(kind, optimizer="sgd"):
    """A small network with the layers of a kind in the middle."""
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(5, activation="tanh"), *KINDS[kind](), layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *stack])
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def vector(like, seed):
    """A standard normal vector."""
    random = np.random.default_rng(seed)
    return [tf.constant(random.standard_normal(a.shape)) for a in like]


def everything(model, x, y, micro_batches):
    """All that leaves a `Linearization`, a piece of it, and what `commit` leaves in the model."""
    u, v = vector(model.trainable_variables, 1), vector(model.trainable_variables, 2)
    lin = Linearization(model, x, y, micro_batches=micro_batches)
    G, H = lin.gauss_newton(), lin.hessian()
    pushed = G.push(v)
    found = {
        "gradient": lin.gradient, "loss": [lin.loss], "gauss_newton": G @ v, "hessian": H @ v,
        "inner": [G.inner(pushed, pushed)], "pull_with_gradient": G.pull_with_gradient(pushed),
        "loss_at": [lin.loss_at(u)], "gradient_at": lin.gradient_at(u), "squared_gradients": lin.squared_gradients(3),
        "piece": lin.chunk(0.5, 1).gradient, "reached": [tf.cast(lin.reached, tf.float64)],
    }  # fmt: skip
    if not any(getattr(layer, "synchronized", False) for layer in model.layers):
        rows = lin.rows()
        w = tf.cos(rows.residual)
        found |= {"gram": [rows.gram()], "transposed": rows.transposed(w), "row_products": [rows @ u],
                  "rows": [rows.dense()], "examples": [lin.gradients_of_examples().gram()]}  # fmt: skip
    lin.commit()
    return found


def on_one(kind, x, y):
    """`everything` on one device."""
    model = build(kind)
    model._symbolic_build(data_batch=(x, y, None))
    found = tf.function(lambda: everything(model, tf.constant(x), tf.constant(y), 1), autograph=False)()
    return found, flat(model.non_trainable_variables or [tf.zeros(1)])


def on_two(strategy, kind, x, y, micro_batches):
    """`everything` on the replicas of a strategy."""
    with strategy.scope():
        model = build(kind)
        model._symbolic_build(data_batch=(x, y, None))
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(len(x))
        batches = iter(strategy.experimental_distribute_dataset(data))

        @tf.function(autograph=False)
        def run():
            x, y = next(batches)
            return everything(model, x, y, micro_batches)

        return run(), flat(model.non_trainable_variables or [tf.zeros(1)])


def fitted(n, x, y):
    """Losses and weights after two epochs with a batch of `n - 8` at the end of each."""
    model = kc.curved(build("synchronized", kc.CurveBall()))
    losses = model.fit(x[:n], y[:n], batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]
    return np.concatenate([losses, flat(model.weights)])


def fitted_to(kind, n, y):
    """Weights after an epoch on inputs that are not dense, of Adam, with a batch of `n - 4` at the end."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,), **{kind: True})
    # reduced, and not made dense: Keras tries models out on symbols of dense tensors
    means = layers.Lambda(lambda x: tf.reduce_mean(x, 1, keepdims=True), (1,))
    model = kc.curved(keras.Model(inputs, layers.Dense(3)(means(inputs) if kind == "ragged" else inputs)))
    model.compile("adam", "mse", jit_compile=False)
    x = np.tril(np.arange(1.0, 3 * n + 1).reshape(n, 3))
    x = tf.RaggedTensor.from_tensor(x, padding=0.0) if kind == "ragged" else tf.sparse.from_dense(x)
    model.fit(tf.data.Dataset.from_tensor_slices((x, y[:n])).batch(4), verbose=0)
    return flat(model.weights)


def probed(kind, x, y):
    """What is measured in training mode, and how far the model's variables have moved."""
    model, found = build(kind), {}
    for of in ("hessian", "fisher", "empirical_fisher") if kind == "dropout" else ("hessian",):
        c = curvature(model, (x, y), of, training=True)
        found |= {"loss": c.loss, "gradient": c.gradient, of: c @ vector(c.variables, 1)}
    before = build(kind)
    return {**found, "state": [a - b.value for a, b in zip(model.variables, before.variables)]}


def reported(x, y):
    """The numbers of a report, but for the noise: where the batch is cut in two, the micro-batches are other ones."""
    said = measure(curvature(build("plain"), (x, y)))
    layers = said["layers"].values()
    return {
        "eigenvalues": [pair["value"] for pair in (*said["top"], said["most_negative"])],
        "traces": [said["trace"]["value"], *(layer["trace"]["value"] for layer in layers)],
        "blocks": [layer["sharpness"]["value"] for layer in layers],
        "density": said["density"]["nodes"], "losses": list(said["landscape"]["loss"].values()),
        "slope": [said["loss"], said["gradient"]["norm"], said["gradient"]["cosine"]],
    }  # fmt: skip


def difference(ours, theirs):
    """Relative to the length of theirs."""
    ours, theirs = (np.concatenate([np.ravel(a) for a in tf.nest.flatten(nest)]) for nest in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-8))


def compared(strategy, case, x, y):
    """`{quantity: difference}` of a case: `kind:batch:micro-batches`, or `fit:examples`."""
    kind, batch, *rest = case.split(":")
    batch = int(batch)
    if kind == "fit":
        one = fitted(batch, x, y)
        with strategy.scope():
            return {"fit": difference(fitted(batch, x, y), one)}
    if kind in ("ragged", "sparse"):
        one = fitted_to(kind, batch, y)
        with strategy.scope():
            return {"fit": difference(fitted_to(kind, batch, y), one)}
    if kind == "probes":
        found = {}
        for layer in ("dropout", "synchronized"):
            one = probed(layer, x[:batch], y[:batch])
            with strategy.scope():
                two = probed(layer, x[:batch], y[:batch])
            found |= {f"{layer} {name}": difference(two[name], one[name]) for name in one}
        return found
    if kind == "report":
        one = reported(x[:batch], y[:batch])
        with strategy.scope():
            two = reported(x[:batch], y[:batch])
        return {name: difference(two[name], one[name]) for name in one}
    one, state = on_one(kind, x[:batch], y[:batch])
    two, state_on_two = on_two(strategy, kind, x[:batch], y[:batch], int(rest[0]))
    if batch < 8:
        del one["piece"]  # slices that are not equal have other pieces
    return {**{name: difference(two[name], one[name]) for name in one}, "state": difference(state_on_two, state)}


def main(cases):
    """Prints `{case: {quantity: difference}}`."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    random = np.random.default_rng(0)
    x, y = random.standard_normal((16, 4)), random.standard_normal((16, 3))
    print(json.dumps({case: compared(strategy, case, x, y) for case in cases}))


with float64():
    main(sys.argv[1:])
