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

    python examples/benchmarks/tracing.py --xla --out examples/benchmarks/results/tracing_xla.txt

`--xla` traces for XLA instead: the train step of every optimizer on a convolutional network of 122 thousand weights,
batches of 64, all in one process. `graph` is the processor time in which Python writes the graph, `program` that in
which TensorFlow turns it into XLA's program, `MB` the size of that program. The target is 15 seconds for both.
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
from keras_curvature import optimizers
from keras_curvature.problems import networks

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
# for XLA: every class of the package, and PSGD with Hessian products
ALL = {
    **{name: (getattr(kc, name), not getattr(kc, name).needs.only_gradients) for name in sorted(optimizers.__all__)
       if name != "CurvatureOptimizer"},
    "PSGD, newton": (lambda: kc.PSGD(kind="newton"), True),
}  # fmt: skip
XLA_BATCH, XLA_TARGET = 64, 15.0


def transformer():
    """`(model, x, y)`: each token's successor among 100, from made-up tokens."""
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(DEPTH):
        x = networks.causal_block(x, 4)
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


def for_xla(make, curve):
    """`(graph, program, megabytes)`: processor seconds of both, and the size of XLA's program of a train step."""
    problem = kc.problems.get("cnn")
    (x, y), model = problem.sample(XLA_BATCH), problem.model(0)
    model = kc.curved(model) if curve else model
    model.compile(make(), problem.loss(), jit_compile=False)  # the function around the step is compiled
    model._symbolic_build(data_batch=(x, y, None))  # as `fit` does before its first step
    model.make_train_function()  # a curved model creates its reports by this
    batch = tf.constant(x), tf.constant(y)
    step = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
    times = [time.process_time()]
    step.get_concrete_function(*batch)
    times.append(time.process_time())
    program = step.experimental_get_compiler_ir(*batch)(stage="hlo_serialized")
    times.append(time.process_time())
    keras.backend.clear_session()
    return times[1] - times[0], times[2] - times[1], len(program) / 1e6


def report_for_xla(args, say):
    """The table of all optimizers."""
    say(f"{versions()}\n\ncnn, batch {XLA_BATCH}\n{'optimizer':28} {'graph s':>8} {'program s':>10} {'MB':>6}")
    for_xla(keras.optimizers.SGD, False)  # what a process does once
    for name in args.optimizers or ALL:
        try:
            graph, program, size = for_xla(*ALL[name])
        except ValueError as error:
            say(f"{name:28} refused: {str(error).split('. ')[0]}.")
            continue
        target = "within" if graph + program <= XLA_TARGET else "ABOVE"
        say(f"{name:28} {graph:8.1f} {program:10.1f} {size:6.2f}  {target} {XLA_TARGET:g}")


def versions():
    """What ran where."""
    return f"Keras {keras.__version__}, keras_curvature {kc.__version__}; {os.cpu_count()} cores ({platform.machine()})"


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
    say(f"{versions()}, median of {args.repetitions} processes")
    for network in args.networks:
        say(f"\n{network}")
        say(f"{'optimizer':12} {'CPU s':>7} {'/ Adam':>7} {'wall s':>7} {'peak GB':>12} {'nodes':>8} traces")
        adam = None
        for name in dict.fromkeys(["Adam", *(args.optimizers or OPTIMIZERS)]):
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
    parser.add_argument("--optimizers", nargs="+", help="default: all of the table")
    parser.add_argument("--xla", action="store_true", help="trace a small network for XLA, with every optimizer")
    parser.add_argument("--repetitions", type=int, default=3, help="processes for each optimizer (default: 3)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        first_step(*args.child)
        return
    known = ALL if args.xla else OPTIMIZERS
    if unknown := set(args.optimizers or ()) - set(known):
        parser.error(f"--optimizers: {', '.join(sorted(unknown))} not in this table, which has {', '.join(known)}")
    from step_cost import printing  # beside this file

    with printing(args.out) as say:
        (report_for_xla if args.xla else report)(args, say)


if __name__ == "__main__":
    main()
