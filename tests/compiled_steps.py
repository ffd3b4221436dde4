"""Steps through a TPU's compiler, or on the CPU by JAX; a program of its own, because both set up the process.

echo compile v5e:1x1 mixed_bfloat16 kfac | python tests/compiled_steps.py     # prints a record as JSON
echo run 4 float32 kfac | python tests/compiled_steps.py                      # 4 replicas on the CPU against TensorFlow

It answers one line after another, because its imports take longer than most steps.
"""

import json
import os
import sys
import traceback

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # tests run in several processes
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tpu_folder  # noqa: F401

import compiler  # isort: skip
import executed  # isort: skip
import traced  # isort: skip

import keras
import numpy as np
import tensorflow as tf
from counting import weights_of
from methods import OPTIMIZERS

import keras_curvature as kc

# where a factor has fewer examples than rows, its null space is rounding noise, which these would amplify
CALM = {"epsilon": 1e-3, "max_dimension": 4}
TRAINED = {
    **OPTIMIZERS, "soap": (lambda: kc.SOAP(**CALM), False), "kl_shampoo": (lambda: kc.KLShampoo(**CALM), False),
    "shampoo": (lambda: kc.Shampoo(epsilon=1e-3), False),
    "splus": (lambda: kc.SPlus(max_dimension=4), False),
    # a Hessian that is indefinite at the first weights, of which a sketch is a matter of rounding
    "nys_newton_cg": (lambda: kc.NysNewtonCG(curvature="gauss_newton"), True),
    # whose first steps are rejected without it
    "newton": (lambda: kc.Newton(damping=1.0), True),
    "gauss_newton": (lambda: kc.GaussNewton(damping=1.0), True),
    "gauss_newton_array": (lambda: kc.GaussNewton.levenberg_marquardt(damping=10.0), True),
    "mfac": (lambda: kc.MFAC(damping=1e-2), False),
    "gauss_newton_cg": (lambda: kc.GaussNewton(damping=1.0, solver=kc.ConjugateGradient()), True),
}  # fmt: skip


def classifier(examples):
    """A small network whose examples do not depend on one another."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3, dtype="float32")]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Sequential([keras.Input((6,)), *layers])
    return model, loss, tf.zeros((examples, 6)), tf.zeros(examples, tf.int32)


def convolutional(examples):
    """One with convolutions, batch statistics and dropout."""
    layers = [keras.layers.Conv2D(3, 3, strides=2), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    layers += [keras.layers.Flatten(), keras.layers.Dropout(0.1), keras.layers.Dense(4, dtype="float32")]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    return model, loss, tf.zeros((examples, 8, 8, 2)), tf.zeros(examples, tf.int32)


def compiled(name, chips):
    """What the compiler says of a step."""
    step = traced.traced(name, convolutional, len(chips.devices), 8)
    found = compiler.compiled(step.text, chips.devices)
    return {
        "memory": found.memory, "flops": found.flops, "collectives": found.collectives,
        "foreign": compiler.foreign(step.text), "model": weights_of(step.model),
    }  # fmt: skip


def trained(name, replicas, steps=3):
    """`{"weights": largest difference, "moved": largest change}` after some steps by JAX and by TensorFlow."""
    import jax

    random = np.random.default_rng(0)
    x, y = random.standard_normal((16, 6)).astype("float32"), random.integers(0, 3, 16).astype("int32")
    make, curve = TRAINED[name]
    step = traced.traced((make, curve), classifier, replicas, 16 // replicas)
    start = [v.numpy() for v in step.model.trainable_variables]
    execution = executed.Execution(step, jax.devices("cpu")[:replicas])
    model, loss, *_ = classifier(16)
    model = kc.curved(model) if curve else model
    model.compile(make(), loss, jit_compile=False)
    for _ in range(steps):
        execution.take(x, y)
        model.train_on_batch(x, y)
    ends = [v.numpy() for v in model.trainable_variables]
    found = [execution.of_replicas(v) for v in step.model.trainable_variables]
    return {
        "weights": max(float(np.abs(part - end).max()) for parts, end in zip(found, ends) for part in parts),
        "moved": max(float(np.abs(a - b).max()) for a, b in zip(start, ends)),
        "replicas": {len(parts) for parts in found} == {replicas},
    }  # fmt: skip


def answer(how, where, policy, name):
    """The record of a step."""
    keras.mixed_precision.set_global_policy(policy)
    return compiled(name, compiler.topology(where)) if how == "compile" else trained(name, int(where))


def main():
    """Print a record for each line of the standard input, or `{"error": the traceback}`."""
    for line in sys.stdin:
        try:
            record = answer(*line.split())
        except Exception:  # of any kind, for the test that asked
            record = {"error": traceback.format_exc()}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
