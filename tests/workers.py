"""One worker of several: trains with the optimizers named on the command line, over loopback.

    python workers.py fit DIRECTORY NAME ...     prints the histories as JSON
    python workers.py resume DIRECTORY NAME      trains with checkpoints; stops dead at a step where it is told to

Run by `test_workers.py`, in two processes with a `TF_CONFIG` each, and for the comparison in one without.
"""

import json
import os
import pathlib
import signal
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf
from optimizers import OPTIMIZERS

import keras_curvature as kc

BATCH, BATCHES = 8, 5
KERAS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, nesterov=True, momentum=0.9),
    "adam_accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "adam_averaging": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3),
}
# the whole set in the same order in every process; the strategy deals the examples out
OPTIONS = tf.data.Options()
OPTIONS.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA


def make(name):
    """The optimizer of that name, ours or Keras' own."""
    return {**OPTIMIZERS, **KERAS}[name]()


def dataset():
    """Classes that can be learnt, in batches."""
    # the last batch leaves one worker with an example less than the other
    x = np.random.default_rng(0).standard_normal((BATCH * BATCHES - 1, 4))
    y = np.argmax(x[:, :3], axis=1).astype("int32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).with_options(OPTIONS)


def compiled(name, strategy, **kwargs):
    """A small curved classifier, built for the strategy."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = keras.layers
        model = kc.curved(keras.Sequential([keras.Input((4,)), layers.Dense(6, activation="tanh"), layers.Dense(3)]))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(make(name), loss, metrics=["accuracy"], jit_compile=False, **kwargs)
    return model


def fit(strategy, directory, names):
    """`{name: history}` of two epochs with validation, and TensorBoard on the chief."""
    histories = {}
    for name in names:
        model = compiled(name, strategy, steps_per_execution=2)
        board = keras.callbacks.TensorBoard(pathlib.Path(directory) / name)
        histories[name] = model.fit(
            dataset(), validation_data=dataset(), epochs=2, shuffle=False, verbose=0,
            callbacks=[kc.callbacks.ChiefOnly(board)],
        ).history  # fmt: skip
    return histories


def resume(strategy, directory, name):
    """All weights and the history at the end of a run that saves every second step, and may be killed in between."""
    model = compiled(name, strategy)
    callbacks = [kc.callbacks.Checkpoint(directory, every=2)]
    if "DIE_AT" in os.environ:
        callbacks.append(keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: die(model)))
    history = model.fit(dataset(), epochs=3, shuffle=False, verbose=0, callbacks=callbacks).history
    weights = [w.numpy().tolist() for w in [*model.variables, *model.optimizer.variables]]
    return {"weights": weights, "history": history}


def die(model):
    """The end without a word, at a step."""
    if int(model.optimizer.iterations.numpy()) == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


def main(what, directory, *names):
    """Prints the last line as JSON."""
    warnings.filterwarnings("ignore")
    keras.config.set_floatx("float64")  # the iterations of conjugate gradients amplify rounding
    several = "TF_CONFIG" in os.environ
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if several else tf.distribute.get_strategy()
    done = fit(strategy, directory, names) if what == "fit" else resume(strategy, directory, *names)
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
