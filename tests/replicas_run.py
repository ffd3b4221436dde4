"""Trains on one replica and on several, over logical CPUs; prints what is left as JSON.

    python replicas_run.py REPLICAS FLOATX OPTIMIZER:KIND ...

Run by `test_replicas.py` in a process of its own: two strategies in one process collide.
"""

import contextlib
import json
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf
from cases import MODELS, flat, float64
from optimizers import prepare
from workers import KERAS

import keras_curvature as kc

STEPS = 10
ROWS = [0, 1, 2, 3, 4, 5, 0, 1]  # of a case's batch, for slices of equal length on two and on four replicas


def rows(data):
    """The data of all steps: the batch of a case, made even, and over again."""
    return keras.tree.map_structure(lambda a: None if a is None else np.concatenate([a[ROWS]] * STEPS), data)


def by_slices(kind):
    """Whether the loss of a batch is made of its slices: by their statistics, or by the masked mean of each."""
    return kind == "masked_outputs" or any(
        isinstance(layer, keras.layers.BatchNormalization) and not layer.synchronized
        for layer in MODELS[kind]().model._flatten_layers()
    )


def trained(name, kind, micro_batches=1, rounding=None):
    """What is left after `STEPS` steps: how far the weights have come, they themselves, batch statistics, the loss.

    With `rounding`, a seed, from weights that differ by the rounding of a number.
    """
    case = MODELS[kind]()
    if rounding is not None:
        random = np.random.default_rng(rounding)
        for v in case.model.trainable_variables:
            v.assign(v.numpy() * (1 + np.finfo(v.dtype).eps * random.choice([-1, 1], v.shape)))
    if name in KERAS:
        model, optimizer = kc.curved(case.model), KERAS[name]()
    else:
        model, optimizer = prepare(name, case.model)
    model.micro_batches = micro_batches
    case.compile(optimizer, jit_compile=False)
    x, y = rows(case.x), rows(case.y)
    start = flat(model.trainable_variables)
    history = model.fit(x, y, batch_size=len(ROWS), epochs=1, shuffle=False, verbose=0).history
    weights = flat(model.trainable_variables)
    return {
        "way": float(np.abs(weights - start).max()), "skipped": sum(history.get("skipped_steps", [0])),
        "weights": weights.tolist(), "loss": history["loss"],
    }  # fmt: skip


def compared(strategy, item):
    """`{"one": what is left, "many": what is left, "rounding": number}` of an item `optimizer:kind`.

    `rounding`: how much the weights of one device differ at the end if they differ by their rounding at the start; 0,
    not computed, where those of many replicas differ by less than ten roundings.
    """
    name, kind = item.split(":")
    slices = strategy.num_replicas_in_sync if by_slices(kind) else 1
    one = trained(name, kind, slices)
    with strategy.scope():
        many = trained(name, kind)
    found = {"one": one, "many": many, "rounding": 0.0}
    weights, few = np.array(one["weights"]), 10 * np.finfo(keras.config.floatx()).eps
    if not np.allclose(many["weights"], weights, rtol=few, atol=few):
        others = [trained(name, kind, slices, rounding=seed) for seed in range(2)]
        found["rounding"] = max(float(np.abs(other["weights"] - weights).max()) for other in others)
    return found


def main(replicas, floatx, *items):
    """Prints `{item: {"one": what is left, "many": what is left, "rounding": number}}`."""
    warnings.filterwarnings("ignore")
    replicas = int(replicas)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    results = {}
    for item in items:
        with float64() if floatx == "float64" else contextlib.nullcontext():
            try:
                results[item] = compared(strategy, item)
            except Exception as error:  # the others shall run all the same
                results[item] = {"error": f"{type(error).__name__}: {error}"[-1500:]}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
