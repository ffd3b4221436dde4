"""Least squares to machine precision: NIST's regressions, a curve, and Poisson's equation.

    python examples/benchmarks/least_squares.py | tee examples/benchmarks/results/least_squares.txt

takes about twenty minutes on two cores; one part alone: `--parts nist`, `sinc`, `poisson`. All in float64.

* NIST: 27 nonlinear regressions with certified weights, each from a far and a near start. The table has the iterations
  and evaluations of the loss (one more for each step taken back) to six digits of all weights. An iteration counts when
  its step is taken.
* sinc: tf-levenberg-marquardt's curve and network (61 weights, batches of 1000). Its README reports 1.03e-8 after 100
  epochs, and 2000 steps in 65 s gave 6.2e-8 on two cores.
* Poisson: the network and grid of the energy natural gradients (129 weights, 1020 points), the error in L2 over another
  grid relative to the solution. Their authors' code gave 0.46 (a stall), 7.7e-6 and 4.6e-8 for three seeds after 200
  iterations.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import GaussNewton, curved, problems
from keras_curvature.problems.regression import CURVES

SEEDS = range(5)
METHODS = {
    "More, Nielsen, geodesic": GaussNewton.levenberg_marquardt,
    "identity, Nielsen": GaussNewton,
    "identity, Nielsen, geodesic": lambda: GaussNewton(geodesic=True),
}
PINN = {
    "More, Nielsen, geodesic": lambda: GaussNewton.levenberg_marquardt(),
    "identity, Nielsen, geodesic": lambda: GaussNewton(geodesic=True),
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


def sinc(seed, seconds):
    """`(mean squared error over all points, steps)` after so many seconds of steps."""
    problem = problems.get("sinc")
    model = curved(problem.compiled(GaussNewton.levenberg_marquardt(), seed=seed))
    x, y = (tf.constant(a) for a in problem.data())
    batches = [(x[i : i + 1000], y[i : i + 1000]) for i in range(0, len(x), 1000)]
    model.train_on_batch(*batches[0])  # traces
    steps, begin = 1, time.perf_counter()
    while time.perf_counter() - begin < seconds:
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


def poisson(seed, method, marks):
    """The relative error after each of `marks` iterations, and the seconds of an iteration."""
    problem = problems.poisson()
    model = curved(problem.compiled(PINN[method](), seed=seed, jit_compile=True))
    data = tf.data.Dataset.from_tensors(problem.data()).cache().repeat()
    errors, done, seconds = [], 1, 0.0
    model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)  # traces
    for mark in marks:
        begin = time.perf_counter()
        model.fit(data, steps_per_epoch=mark - done, shuffle=False, verbose=0)
        seconds, done = seconds + time.perf_counter() - begin, mark
        errors.append(problems.relative_error(model))
    return errors, seconds / (done - 1)


def print_poisson(marks, methods):
    """The table of five seeds, for each method."""
    for method in methods:
        print(row(f"Poisson, {method}", [f"{mark} its" for mark in marks] + ["ms an iteration"]))
        found = []
        for seed in SEEDS:
            errors, seconds = poisson(seed, method, marks)
            found.append(errors)
            print(row(f"  seed {seed}", [f"{e:.1e}" for e in errors] + [f"{1000 * seconds:.0f}"]), flush=True)
        columns = list(zip(*found))
        print(row("  median", [f"{statistics.median(c):.1e}" for c in columns]))
        print(row("  worst", [f"{max(c):.1e}" for c in columns]) + "\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Least squares to machine precision.")
    parser.add_argument("--parts", nargs="*", default=["nist", "sinc", "poisson"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="of NIST's table")
    parser.add_argument("--seconds", type=float, default=65.0, help="of sinc")
    parser.add_argument("--marks", nargs="*", type=int, default=[200, 1000], help="iterations of Poisson's equation")
    parser.add_argument("--pinn", nargs="*", default=list(PINN), help="methods for Poisson's equation")
    args = parser.parse_args()
    keras.config.set_floatx("float64")
    if "nist" in args.parts:
        print_nist(args.methods)
    if "sinc" in args.parts:
        print_sinc(args.seconds)
    if "poisson" in args.parts:
        print_poisson(args.marks, args.pinn)


if __name__ == "__main__":
    main()
