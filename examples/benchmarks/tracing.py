"""What the first step costs: seconds until a training has taken it, peak memory, and the size of the traced graph.

    python examples/benchmarks/tracing.py --out examples/benchmarks/results/tracing.txt

Two networks of Keras: `transformer` (12 layers of attention and feed-forward, width 64, 32 tokens, batches of 8), and
`resnet50` (`keras.applications.ResNet50` on images of 32 x 32, batches of 8). How it measures:

* One process for each optimizer and repetition. The clock starts when the model is compiled and stops when `fit` on one
  batch returns. `CPU s` is processor time of all threads, which other work on the machine disturbs least; the table
  has the median, and the ratio to Adam's.
* `peak GB` is the largest resident memory of the process, TensorFlow itself included (about 0.5 GB), when the step is
  traced and when it has run.
* `nodes` counts the operations in the traced step and in all functions that it calls (branches, loop bodies).
* `traces` counts how often Python ran the train step.
* Weights are drawn from one seed, because the first step of Hessian-free is not tracing alone: it has as many
  iterations of conjugate gradients as these weights take, which its row says.

The targets are this project's own: every family within 2.5 times Adam's first step, Hessian-free within 4; K-FAC's
peak memory on ResNet-50 within twice Adam's.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_curvature as kc

BATCH, TOKENS, VOCABULARY, WIDTH, DEPTH = 8, 32, 100, 64, 12
# name: (optimizer, whether the model must be curved)
OPTIMIZERS = {
    "Adam": (keras.optimizers.Adam, False),
    "Neumann": (kc.Neumann, False),
    "SophiaG": (kc.SophiaG, True),
    "CurveBall": (kc.CurveBall, True),
    "AdaHessian": (kc.AdaHessian, True),
    "SOAP": (kc.SOAP, False),
    "Muon": (kc.Muon, False),
    "Shampoo": (kc.Shampoo, False),
    "PSGD": (kc.PSGD, False),
    "Eva": (kc.Eva, True),
    "KFAC": (kc.KFAC, True),
    "EKFAC": (kc.EKFAC, True),
    "HessianFree": (kc.HessianFree, True),
}
TARGETS = {name: 4.0 if name == "HessianFree" else 2.5 for name in OPTIMIZERS if name != "Adam"}
MEMORY_TARGETS = {("resnet50", "KFAC"): 2.0}


def transformer():
    """`(model, x, y)`: each token's successor among 100, from made-up tokens."""
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(DEPTH):
        normal = layers.LayerNormalization()(x)
        x += layers.MultiHeadAttention(4, WIDTH // 4)(normal, normal, use_causal_mask=True)
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x += layers.Dense(WIDTH)(hidden)
    outputs = layers.Dense(VOCABULARY)(layers.LayerNormalization()(x))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TOKENS + 1))
    return keras.Model(inputs, outputs), tokens[:, :-1].astype("int32"), tokens[:, 1:]


def resnet50():
    """`(model, x, y)`: ten classes, from made-up images."""
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None)
    random = np.random.default_rng(0)
    return model, random.normal(size=(BATCH, 32, 32, 3)).astype("float32"), random.integers(0, 10, BATCH)


NETWORKS = {"transformer": transformer, "resnet50": resnet50}


def first_step(network, name):
    """Print the figures of one first step in this process, as JSON."""
    keras.utils.set_random_seed(0)
    model, x, y = NETWORKS[network]()
    make, curve = OPTIMIZERS[name]
    model = counting(kc.curved(model) if curve else model)
    model.compile(make(), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    wall, cpu = time.perf_counter(), time.process_time()
    history = model.fit(x, y, batch_size=BATCH, verbose=0).history
    figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    figures |= {"gigabytes": peak(), "traced": model.peak, "nodes": nodes(model.graph), "traces": model.traces}
    figures["iterations"] = history.get("cg_iterations", [0])[0]
    print(json.dumps(figures))


def peak():
    """The largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def counting(model):
    """The model, whose class counts how often Python runs its train step, and keeps the graph of the last time."""

    class Counting(type(model)):
        traces, graph, peak = 0, None, 0.0

        def train_step(self, data):
            type(self).traces += 1
            type(self).graph = tf.compat.v1.get_default_graph()
            logs = super().train_step(data)
            type(self).peak = peak()
            return logs

    model.__class__ = Counting
    return model


def nodes(graph):
    """Operations in a graph and in all functions that it calls."""
    definition = graph.as_graph_def()
    return len(definition.node) + sum(len(function.node_def) for function in definition.library.function)


def measured(network, name, repetitions):
    """The medians of some processes, `{figure: number}`; None where one failed."""
    runs = []
    for _ in range(repetitions):
        command = [sys.executable, __file__, "--child", network, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return None
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


def verdict(network, name, ratio, memory, iterations):
    """What a row says of its targets."""
    words = []
    if name in TARGETS:
        words.append(f"{'within' if ratio <= TARGETS[name] else 'ABOVE'} {TARGETS[name]}")
    if (network, name) in MEMORY_TARGETS:
        most = MEMORY_TARGETS[network, name]
        traced, whole = memory
        words.append(f"memory {traced:.2f} and {whole:.2f} x, {'within' if whole <= most else 'ABOVE'} {most}")
    if iterations:
        words.append(f"{iterations:.0f} iterations")
    return ", ".join(words)


def report(args, say):
    """The tables of the networks."""
    say(f"Keras {keras.__version__}, keras_curvature {kc.__version__}; {os.cpu_count()} cores ({platform.machine()}), "
        f"median of {args.repetitions} processes")  # fmt: skip
    for network in args.networks:
        say(f"\n{network}")
        say(f"{'optimizer':12} {'CPU s':>7} {'/ Adam':>7} {'wall s':>7} {'peak GB':>12} {'nodes':>8} traces")
        adam = None
        for name in dict.fromkeys(["Adam", *args.optimizers]):
            found = measured(network, name, args.repetitions)
            if found is None:
                say(f"{name:12} failed")
                continue
            adam = adam or found
            ratio, memory = found["cpu"] / adam["cpu"], [found[f] / adam[f] for f in ("traced", "gigabytes")]
            gigabytes = f"{found['traced']:5.2f}, {found['gigabytes']:5.2f}"
            say(f"{name:12} {found['cpu']:7.1f} {ratio:7.2f} {found['wall']:7.1f} {gigabytes:>12} "
                f"{found['nodes']:8.0f} {found['traces']:6.0f}  "
                f"{verdict(network, name, ratio, memory, found['iterations'])}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Seconds, memory and graph size of the first training step.")
    parser.add_argument("--out", help="write what is printed to this file too")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--repetitions", type=int, default=3, help="processes for each optimizer (default: 3)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        first_step(*args.child)
        return
    from step_cost import printing  # beside this file

    with printing(args.out) as say:
        report(args, say)


if __name__ == "__main__":
    main()
