"""Least squares to machine precision: NIST's regressions, a curve, and Poisson's equation.

    python examples/benchmarks/least_squares.py | tee examples/benchmarks/results/least_squares.txt

takes about half an hour on two cores, in float64. `--parts nist`, `--parts sinc` or `--parts poisson` runs one part
alone. In three more parts, seconds are processor time of all threads:

    python examples/benchmarks/least_squares.py --parts waves --marks 50 100 150 200   # --floatx float32
    python examples/benchmarks/least_squares.py --parts mnist --data_dir DIR --peers PYTHON
    python examples/benchmarks/least_squares.py --parts peers --seconds 15 --peers PYTHON

`PYTHON` is a Python in which jaxopt, python-somax and tf-levenberg-marquardt are installed; see
`least_squares_peers.py`. Without `--peers`, only this package runs.

* NIST: 27 nonlinear regressions with certified weights, each from a far and a near start. The table has the iterations
  and evaluations of the loss (one more for each step taken back) to six digits of all weights. An iteration counts when
  its step is taken.
* sinc: tf-levenberg-marquardt's curve and network (61 weights, batches of 1000). Its README reports 1.03e-8 after 100
  epochs, and 2000 steps in 65 s gave 6.2e-8 on two cores.
* Poisson: the network and grid of the energy natural gradients (129 weights, 1020 points), the error in L2 over another
  grid relative to the solution. Their authors' code gave 0.46 (a stall), 7.7e-6 and 4.6e-8 for three seeds after 200
  iterations.
* waves: convection, reaction and waves in one dimension, on which PINNs fail (Rathore et al., 2024: errors of 1.9e-3,
  9.9e-3 and 1.3e-2 after 11000 steps of Adam, 30000 of L-BFGS and 2000 of NysNewton-CG, with 10000 points and layers of
  200).
* MNIST: tf-levenberg-marquardt's convolutional network of 1026 weights, its residuals, and its 10 epochs of batches of
  6000, in float32. Its README reports a test accuracy of 97.78% and a loss of 0.0724. Its 100 steps take half an hour
  or more of one core for each seed, so `--peer_steps` of them are run, and the seconds of 100 computed from these.
* peers: the curve of `sinc`, for `--seconds` from the same weights. jaxopt has no mini-batches and takes all points.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import GaussNewton, GridSearch, LevenbergMarquardt, Nielsen, curved, problems
from keras_curvature.problems.regression import CURVES

SEEDS = range(5)


def fourth_order(**kwargs):
    """Levenberg-Marquardt with a path of fourth order, searched along the curve."""
    return GaussNewton.levenberg_marquardt(geodesic=4, line_search=GridSearch(count=5), **kwargs)


METHODS = {
    "More, Nielsen, geodesic": GaussNewton.levenberg_marquardt,
    "identity, Nielsen": GaussNewton,
    "identity, Nielsen, geodesic": lambda: GaussNewton(geodesic=True),
}
PINN = {
    "More, Nielsen, geodesic": lambda: GaussNewton.levenberg_marquardt(),
    "identity, Nielsen, geodesic": lambda: GaussNewton(geodesic=True),
    # the book's first damping far from a solution
    "More, tau 1e-3, geodesic": lambda: GaussNewton.levenberg_marquardt(damping=Nielsen(tau=1e-3)),
    "More, Nielsen, order 4, search": fourth_order,
}


def row(first, cells):
    """One row of a table."""
    return f"{first:30}" + "".join(f"{cell:>16}" for cell in cells)


def nist(name, start, method, most=2500):
    """`(iterations, evaluations)` to six digits of the certified weights; `None` where they are not met."""
    problem = problems.nist(name)
    model = curved(problem.compiled(METHODS[method](), seed=start))
    (certified,), taken = problem.solution(), 0
    x, y = (tf.constant(a) for a in problem.data())
    for evaluations in range(1, most + 1):
        logs = model.train_on_batch(x, y, return_dict=True)
        taken += logs["step_length"] > 0
        if np.all(np.abs(model.get_weights()[0] - certified) <= 1e-6 * np.abs(certified)):
            return taken, evaluations
    return None


def print_nist(methods):
    """The table of all starts."""
    print(row("NIST", methods))
    met = dict.fromkeys(methods, 0)
    for name in CURVES:
        for start in (0, 1):
            found = {method: nist(name, start, method) for method in methods}
            cells = ["-" if f is None else f"{f[0]}/{f[1]}" for f in found.values()]
            print(row(f"  {name}, start {start + 1}", cells), flush=True)
            for method, f in found.items():
                met[method] += f is not None
    print(row("  six digits, of 54 starts", [str(met[method]) for method in methods]) + "\n", flush=True)


def sinc(seed, seconds, clock=time.perf_counter):
    """`(mean squared error over all points, steps)` after so many seconds of steps."""
    problem = problems.get("sinc")
    model = curved(problem.compiled(GaussNewton.levenberg_marquardt(), seed=seed))
    x, y = (tf.constant(a) for a in problem.data())
    batches = [(x[i : i + 1000], y[i : i + 1000]) for i in range(0, len(x), 1000)]
    model.train_on_batch(*batches[0])  # traces
    steps, begin = 1, clock()
    while clock() - begin < seconds:
        model.train_on_batch(*batches[steps % len(batches)])
        steps += 1
    return float(tf.reduce_mean(tf.square(model(x) - y))), steps


def print_sinc(seconds):
    """The table of five seeds."""
    found = [sinc(seed, seconds) for seed in SEEDS]
    print(row(f"sinc(10 x), {seconds} s", ["median", "worst", "steps"]))
    errors = [error for error, _ in found]
    cells = [f"{statistics.median(errors):.1e}", f"{max(errors):.1e}", f"{statistics.median(s for _, s in found):.0f}"]
    print(row("  mean squared error", cells) + "\n", flush=True)


def after(marks, problem, optimizer, seed=0, clock=time.perf_counter, **how):
    """The relative error after each of `marks` iterations, and the seconds of an iteration, without the first."""
    model = curved(problem.compiled(optimizer, seed=seed, **how))
    data = tf.data.Dataset.from_tensors(problem.data()).cache().repeat()
    errors, done, seconds = [], 1, 0.0
    model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)  # traces
    for mark in marks:
        begin = clock()
        model.fit(data, steps_per_epoch=mark - done, shuffle=False, verbose=0)
        seconds, done = seconds + clock() - begin, mark
        errors.append(problems.relative_error(model))
    return errors, seconds / (done - 1)


def print_poisson(marks, methods):
    """The table of five seeds, for each method."""
    for method in methods:
        print(row(f"Poisson, {method}", [f"{mark} its" for mark in marks] + ["ms an iteration"]))
        found = []
        for seed in SEEDS:
            errors, seconds = after(marks, problems.poisson(), PINN[method](), seed, jit_compile=True)
            found.append(errors)
            print(row(f"  seed {seed}", [f"{e:.1e}" for e in errors] + [f"{1000 * seconds:.0f}"]), flush=True)
        columns = list(zip(*found))
        print(row("  median", [f"{statistics.median(c):.1e}" for c in columns]))
        print(row("  worst", [f"{max(c):.1e}" for c in columns]) + "\n", flush=True)


# Convection, reaction and waves.


def print_waves(points, width, marks):
    """Errors of the problems of Rathore et al. (2024) after each of `marks` iterations."""
    columns = [f"{mark} its" for mark in marks]
    print(row(f"{points} points, 3 layers of {width}", [*columns, "CPU s each"]), flush=True)
    for name in ("convection", "reaction", "wave"):
        problem = getattr(problems, name)(points=points, width=width)
        # the array has some thousand rows and columns: the normal equations are the cheapest
        optimizer = fourth_order(solver="weights")
        errors, seconds = after(marks, problem, optimizer, clock=time.process_time, jit_compile=False)
        print(row(f"  {name}", [*(f"{e:.1e}" for e in errors), f"{seconds:.2f}"]), flush=True)
    print()


# MNIST.


def mnist_network(seed=0):
    """tf-levenberg-marquardt's network."""
    keras.utils.set_random_seed(seed)
    sizes = [(8, 4, 2), (4, 4, 2), (4, 2, 1), (4, 2, 1), (4, 2, 1)]
    layers = [keras.layers.Conv2D(filters, kernel, strides, activation="tanh") for filters, kernel, strides in sizes]
    return keras.Sequential([keras.Input((28, 28, 1)), *layers, keras.layers.Flatten(), keras.layers.Dense(10)])


def root(p):
    """The residual of an example from the probability of its label."""
    return tf.sqrt(1e-7 - tf.math.log(tf.maximum(p, 1e-30)))


def mnist(train, test, epochs, seed=0, batch_size=6000):
    """Test accuracies and losses after each epoch, and the seconds until then; of training alone, with tracing.

    The residuals of the peer: the root of the cross-entropy of each example, so that a mean square is the mean
    cross-entropy, and the Jacobian has one row for an example. The labels are an input of the model of residuals.
    """
    network, (x, y) = mnist_network(seed), train
    labels = keras.Input((10,))
    likely = keras.layers.Dot(1)([keras.layers.Softmax()(network.outputs[0]), labels])
    model = curved(keras.Model([*network.inputs, labels], keras.layers.Activation(root)(likely)))
    falling = keras.optimizers.schedules.CosineDecay(0.3, -(-len(x) // batch_size) * epochs)
    damping = LevenbergMarquardt(initial=2e-3, decay=0.4, low=0.1, high=0.5, every=1)
    model.compile(GaussNewton(falling, damping, solver="weights"), "mse", jit_compile=False)
    network.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    given, spent = ([x, np.eye(10, dtype=x.dtype)[y]], np.zeros([len(x), 1], x.dtype)), 0.0
    for _ in range(epochs):
        begin = time.process_time()
        model.fit(*given, batch_size=batch_size, verbose=0)
        spent += time.process_time() - begin
        tested = network.evaluate(*test, batch_size=2000, verbose=0, return_dict=True)
        yield tested["accuracy"], tested["loss"], spent


def print_mnist(data_dir, epochs, seeds, python, peer_steps, peer_seeds):
    """The table of all epochs of the first seed, and of the last epoch of the others."""
    keras.config.set_floatx("float32")
    train, test = problems.data("mnist", data_dir)
    print(row("MNIST, 1026 weights", ["test accuracy", "test loss", "CPU seconds"]), flush=True)
    ends = []
    for seed in seeds:
        for epoch, (accuracy, loss, seconds) in enumerate(mnist(train, test, epochs, seed), 1):
            cells = [f"{100 * accuracy:.2f}%", f"{loss:.4f}", f"{seconds:.0f}"]
            if seed == seeds[0] or epoch == epochs:
                print(row(f"  ours, seed {seed}, epoch {epoch}", cells), flush=True)
        ends.append(accuracy)
    if ends:
        print(row("    median and worst seed", [f"{100 * statistics.median(ends):.2f}%", f"{100 * min(ends):.2f}%"]))
    arrays = {"x": train[0], "y": train[1], "x_test": test[0], "y_test": test[1]}
    for seed in peer_seeds if python else ():
        found = of_peer(python, "mnist", arrays, steps=peer_steps, network=mnist_network().to_json(), seed=seed)
        cells = [f"{100 * found['test']:.2f}%", f"{found['loss']:.4f}", f"{found['seconds']:.0f}"]
        print(row(f"  tf-levenberg..., seed {seed}, {peer_steps + 1} steps", cells), flush=True)
        print(row("    so its 10 epochs", ["", "", f"{100 * found['seconds'] / peer_steps:.0f}"]), flush=True)
    print()


# Peers.


def of_peer(python, peer, arrays, **options):
    """What a peer of `least_squares_peers.py` found."""
    program = pathlib.Path(__file__).with_name("least_squares_peers.py")
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "problem.npz")
        np.savez(path, **arrays)
        asked = [python, str(program), path, json.dumps({"peer": peer, **options})]
        run = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def print_peers(seconds, python):
    """The curve by each package."""
    problem = problems.get("sinc")
    model, (x, y) = problem.compiled("sgd", seed=0), problem.data()
    arrays = {"x": x, "y": y, **{f"w{i}": w for i, w in enumerate(model.get_weights())}}
    print(row(f"sinc(10 x), {seconds} s of CPU", ["squared error", "steps"]))
    error, steps = sinc(0, seconds, time.process_time)
    print(row("  ours", [f"{error:.1e}", str(steps)]), flush=True)
    for peer in ("tf_levenberg_marquardt", "jaxopt", "somax") if python else ():
        found = of_peer(python, peer, arrays, seconds=seconds)
        print(row(f"  {peer}", [f"{found['error']:.1e}", str(found["steps"])]), flush=True)
    print()


def main():
    parser = argparse.ArgumentParser(description="Least squares to machine precision.")
    parser.add_argument("--parts", nargs="*", default=["nist", "sinc", "poisson"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="of NIST's table")
    parser.add_argument("--seconds", type=float, default=65.0, help="of sinc")
    parser.add_argument("--data_dir", help="of TensorFlow Datasets, with MNIST")
    parser.add_argument("--epochs", type=int, default=10, help="of MNIST")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of MNIST")
    parser.add_argument("--peer_seeds", nargs="*", type=int, default=[0], help="of tf-levenberg-marquardt on MNIST")
    parser.add_argument("--peer_steps", type=int, default=5, help="the same, after the first; 99 are all")
    parser.add_argument("--peers", help="a Python with the packages of least_squares_peers.py")
    parser.add_argument("--marks", nargs="*", type=int, default=[200, 1000], help="iterations of poisson and waves")
    parser.add_argument("--points", type=int, default=2000, help="points inside, of waves; the paper: 10000")
    parser.add_argument("--width", type=int, default=30, help="of the layers of waves; the paper: 200")
    methods = f"for Poisson's equation, among {', '.join(PINN)}"
    parser.add_argument("--pinn", nargs="*", default=["More, Nielsen, order 4, search"], help=methods)
    parser.add_argument("--floatx", choices=["float32", "float64"], default="float64", help="of poisson and waves")
    args = parser.parse_args()
    keras.config.set_floatx(args.floatx)
    if "nist" in args.parts:
        print_nist(args.methods)
    if "sinc" in args.parts:
        print_sinc(args.seconds)
    if "poisson" in args.parts:
        print_poisson(args.marks, args.pinn)
    if "waves" in args.parts:
        print_waves(args.points, args.width, args.marks)
    if "peers" in args.parts:
        print_peers(args.seconds, args.peers)
    if "mnist" in args.parts:
        print_mnist(args.data_dir, args.epochs, args.seeds, args.peers, args.peer_steps, args.peer_seeds)


if __name__ == "__main__":
    main()
