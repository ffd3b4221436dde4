"""Batches larger than memory: what a step needs with a batch of B, whole and as k micro-batches, and with one of B/k.

    python examples/benchmarks/micro_batches.py --out examples/benchmarks/results/micro_batches.txt

The network is convolutional, and its activations dominate memory (five layers of 32x32x32 for each example). The data
are generated; graph mode. Each candidate runs in its own process. The number is the peak of resident memory while steps
run, above the memory after the model is built, the batch loaded, the optimizer's slots allocated and the step traced.
The target is this project's own: micro-batches take at most 1.25 times the memory of a batch of B/k.

The seconds of a step are only a rough guide. With micro-batches, each product repeats the forward pass.
"""

import argparse
import os
import platform
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_curvature as kc

tf.get_logger().setLevel("ERROR")

TARGET = 1.25
OPTIMIZERS = {
    "Neumann": kc.Neumann,
    "CurveBall": kc.CurveBall,
    "HessianFree": lambda: kc.HessianFree(solver=kc.ConjugateGradient(max_steps=5)),
}


def network():
    """32x32x3 to ten classes, at full resolution up to the end."""
    stack = [layers.Conv2D(32, 3, padding="same", activation="tanh") for _ in range(5)]
    return keras.Sequential([keras.Input((32, 32, 3)), *stack, layers.GlobalAveragePooling2D(), layers.Dense(10)])


def child(optimizer, batch, micro_batches):
    """Prints MB and seconds of a step, for `measured`."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = tf.constant(random.standard_normal((batch, 32, 32, 3)).astype("float32"))
    y = tf.constant(random.integers(0, 10, batch).astype("int32"))
    model = kc.curved(network(), micro_batches=micro_batches)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](), loss, jit_compile=False)
    model._symbolic_build(data_batch=(x, y, None))
    model.make_train_function()

    @tf.function(autograph=False)
    def steps(n):
        def step(i):
            model.train_step((x, y))
            return [i + 1]

        return tf.while_loop(lambda i: i < n, step, [0], parallel_iterations=1)

    steps(tf.constant(0))  # traced and optimized, not run
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins again from here
    before, start = resident("VmRSS"), time.perf_counter()
    steps(tf.constant(2))
    print((resident("VmHWM") - before) / 2**10, (time.perf_counter() - start) / 2)


def resident(what):
    """Resident memory of this process in kB, now ("VmRSS") or at its peak ("VmHWM"); Linux says so."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(what)).split()[1])


def measured(optimizer, batch, micro_batches):
    """`(MB, seconds)` of a step, in a process of its own."""
    command = [sys.executable, __file__, "--child", optimizer, str(batch), str(micro_batches)]
    # with two arenas only, freed memory is found again, whatever the threads
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "2"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    megabytes, seconds = map(float, done.stdout.split()[-2:])
    return megabytes, seconds


def main():
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--micro_batches", type=int, default=8)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", help="a file for the table")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        optimizer, batch, micro_batches = arguments.child
        child(optimizer, int(batch), int(micro_batches))
        return
    batch, k = arguments.batch_size, arguments.micro_batches
    lines = [
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_curvature {kc.__version__}; "
        f"{os.cpu_count()} cores ({platform.machine()}), graph mode",
        f"peak memory of a step in MB, of a batch of {batch}, of the same in {k} micro-batches, of one of {batch // k}",
        "",
        f"{'':12}{'whole':>10}{'micro':>10}{'small':>10}  {'micro/small':>12}  target      {'seconds of each':>20}",
    ]
    print(*lines, sep="\n", flush=True)
    for optimizer in arguments.optimizers:
        found = [measured(optimizer, *choice) for choice in ((batch, 1), (batch, k), (batch // k, 1))]
        (whole, _), (micro, _), (small, _) = found
        verdict = f"<= {TARGET:.2f} {'yes' if micro / small <= TARGET else 'NO'}"
        seconds = "  ".join(f"{s:6.2f}" for _, s in found)
        megabytes = f"{whole:10.0f}{micro:10.0f}{small:10.0f}"
        lines.append(f"{optimizer:12}{megabytes}  {micro / small:12.2f}  {verdict:12}{seconds}")
        print(lines[-1], flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
