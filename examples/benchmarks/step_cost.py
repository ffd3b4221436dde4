"""What a step costs: time, memory and passes of the optimizers against Keras' SGD with Nesterov momentum.

    python examples/benchmarks/step_cost.py --out examples/benchmarks/results/step_cost.txt

Three networks (`mlp` 784-512-512-10 with batches of 128; `cnn` on 32x32x3 and a small `transformer`, batches of 64),
graph mode, generated data. How it measures:

* Time: `ms/step` is one call of the model's train function on a batch in memory, as in `fit`; the targets are for
  this number. `in graph` is the same step in a loop inside one `tf.function`, without the overhead of Keras and
  Python, which is the same for all. The candidates take turns, round after round. A ratio is the median over the
  rounds of the ratio within a round, so a machine that is busy for a while disturbs it little. `--clock cpu` counts
  the seconds of all cores instead of the wall's, for machines that others use too.
* Stalls: `median`, `p99` and `longest` are percentiles of single steps, in steps of SGD (`--stalls`), and `--figure`
  draws all percentiles. Factors, bases and roots that are due in one step make it long.
* Memory: one process per optimizer; the peak of its resident memory while steps run, above the memory after the model
  is built, the optimizer's slots allocated and the step traced. The table also lists the slots, the variables of the
  optimizer, in copies of the weights.
* Passes: the matrix products and convolutions of the traced step that its results depend on. After a `+` come those
  inside conditions and loops, each once (CurveBall's loss after the step, every fifth step). CurveBall's count includes
  five tiny ones: three of its 2x2 system, two of the second derivative of the cross-entropy.
* Work that is done every so many steps (factors, inverses, roots, curvature) is averaged: a round has a whole number of
  the longest period. `B/weight` gives the slots in bytes per weight, which for factors depends on the layers' shapes.

Rows of the Jacobian are measured in CPU seconds, on the `mlp` with one output and so 128 rows: the Gram matrix by
layers, and a step of `GaussNewton(solver="rows")`, each with all its passes, in gradients of the same network.

Products are those of `Linearization`: alone, with their forward pass; and amortized, the cost of one more product in a
loop, as in conjugate gradients. The targets are this project's own.
"""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf

import keras_curvature as kc
from keras_curvature import trees
from keras_curvature.operators import Identity

tf.get_logger().setLevel("ERROR")  # every candidate is traced, which TensorFlow takes for a mistake

PROBLEMS = {"mlp": 128, "cnn": 64, "transformer": 64}
CG_STEPS = 30


def sgd():
    return keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)


def conjugate_gradient():
    return kc.ConjugateGradient(max_steps=CG_STEPS, progress_tolerance=0.0)


def hessian_free():
    return kc.HessianFree(solver=conjugate_gradient())


def lbfgs():
    """One evaluation in each step: a search on a batch that never changes would come to the minimum, and to an end."""
    return kc.LBFGS(1e-4, search=None)


# name: (optimizer, whether the model must be curved, steps in a round: a multiple of its longest period)
OPTIMIZERS = {
    "SGD": (sgd, False, 20),
    "Adam": (keras.optimizers.Adam, False, 20),
    "Neumann": (kc.Neumann, False, 20),
    "CurveBall": (kc.CurveBall, True, 10),
    "TwoLoopNeumann": (kc.TwoLoopNeumann, True, 2),
    "HessianFree": (hessian_free, True, 1),
    "AdaHessian": (kc.AdaHessian, True, 10),
    "SASSHA": (kc.SASSHA, True, 10),
    "SophiaH": (kc.SophiaH, True, 20),
    "SophiaG": (kc.SophiaG, True, 20),
    "ESGD": (kc.ESGD, True, 20),
    "DiagonalNewton": (kc.DiagonalNewton, True, 10),
    "SquareRootFreeAdam": (kc.SquareRootFreeAdam, False, 20),
    "KFAC": (lambda: kc.KFAC(factors_every=10, inverses_every=100), True, 100),
    "EKFAC": (lambda: kc.EKFAC(factors_every=10, inverses_every=100), True, 100),
    "Eva": (kc.Eva, True, 20),
    "FOOF": (lambda: kc.FOOF(factors_every=10, inverses_every=100), True, 100),
    "SINGD": (lambda: kc.SINGD(every=10), True, 10),
    "SKFAC": (kc.SKFAC, True, 10),
    "SENG": (kc.SENG, True, 10),
    "TNT": (kc.TNT, True, 100),
    "IFShampoo": (kc.IFShampoo, True, 10),
    "KBFGS": (kc.KBFGS, True, 10),
    "LocoProp": (kc.LocoProp, True, 10),
    "LocoProp, squared": (lambda: kc.LocoProp(loss="squared"), True, 10),
    "MKOR": (kc.MKOR, True, 10),
    "Shampoo": (lambda: kc.Shampoo(every=10), False, 10),
    "Shampoo, one-sided": (lambda: kc.Shampoo(every=10, sides="shortest"), False, 10),
    "Shampoo, blocks": (lambda: kc.Shampoo(every=10, block_size=128), False, 10),
    "Shampoo, sketched": (lambda: kc.Shampoo(every=10, root=kc.SketchedRoot(32)), False, 10),
    "Shampoo, one sketch": (
        lambda: kc.Shampoo(every=10, root=kc.SketchedRoot(32), sides="shortest"), False, 10
    ),
    "Shampoo, binomial": (lambda: kc.Shampoo(every=10, root=kc.BinomialRoot()), False, 10),
    "SOAP": (lambda: kc.SOAP(every=10), False, 10),
    "SOAP, one-sided": (lambda: kc.SOAP(every=10, sides="shortest"), False, 10),
    "SOAP, blocks": (lambda: kc.SOAP(every=10, block_size=128), False, 10),
    "SOAP, both": (lambda: kc.SOAP(every=10, block_size=128, sides="shortest"), False, 10),
    "KLShampoo": (lambda: kc.KLShampoo(every=10), False, 10),
    "KLShampoo, blocks": (lambda: kc.KLShampoo(every=10, block_size=128), False, 10),
    "PSGD": (kc.PSGD, False, 10),
    "Muon": (kc.Muon, False, 10),
    "Muon, Dion": (kc.Muon.dion, False, 10),
    "Muon, Dion2": (kc.Muon.dion2, False, 10),
    "NewtonMuon": (kc.NewtonMuon, True, 32),
    "Keras' Muon": (keras.optimizers.Muon, False, 10),  # convolutions and attention are AdamW's there
    "Scion": (kc.Scion, False, 10),
    "SPlus": (kc.SPlus, False, 100),
    "LBFGS": (lbfgs, True, 10),
    "MFAC": (lambda: kc.MFAC(window=32), False, 10),
    "GGT": (kc.GGT, False, 10),
    "NaturalGradient": (kc.NaturalGradient, True, 5),
    "GaussNewton": (lambda: kc.GaussNewton(damping=1.0, solver=conjugate_gradient()), True, 1),
    "NewtonCG": (lambda: kc.NewtonCG(max_steps=CG_STEPS), True, 1),
}
TARGETS = {
    ("Neumann", "mlp"): 1.10, ("Neumann", "cnn"): 1.10, ("Neumann", "transformer"): 1.10,
    ("CurveBall", "mlp"): 2.0, ("CurveBall", "cnn"): 2.5, ("CurveBall", "transformer"): 2.2,
    ("AdaHessian", "mlp"): 2.4, ("AdaHessian", "cnn"): 3.0,
    **{(name, problem): 1.3 for name in ("SophiaH", "SophiaG") for problem in ("mlp", "cnn")},
    ("KFAC", "cnn"): 1.35, ("SOAP", "cnn"): 2.0, ("Shampoo", "cnn"): 2.0,
    ("Hessian product", "mlp"): 2.0, ("Gauss-Newton product", "mlp"): 1.5,
}  # fmt: skip
ROWS_TARGETS = {"Gram matrix by layers": 1.5, "GaussNewton step by rows": 4.0}
CG_TARGET = 1.2  # one iteration, in Gauss-Newton products
SLOTS = {"Neumann": 2, "CurveBall": 1, "HessianFree": 2}


# A step to time.


def batch_of(name):
    """One batch in memory."""
    x, y = kc.problems.get(name).sample(PROBLEMS[name])
    return tf.constant(x), tf.constant(y)


def step_of(name, optimizer):
    """`(model, steps, calls)`: `n` training steps on one batch, inside one graph, and as `fit` makes them."""
    make, curve, _ = OPTIMIZERS[optimizer]
    problem = kc.problems.get(name)
    model = problem.model(0)
    if curve:
        model = kc.curved(model)
    model.compile(make(), loss=problem.loss(), jit_compile=False)
    x, y = batch_of(name)
    model.optimizer.build(model.trainable_variables)
    # Keras creates the loss and its metric at the first call; here, because variables cannot be born in a loop
    model.compute_loss(x, y, model(x))
    model.make_train_function()

    step = tf.autograph.experimental.do_not_convert(model.train_step)  # as Keras' own train function has it

    @tf.function
    def steps(n):
        for _ in tf.range(n):
            step((x, y))

    iterator = iter(tf.data.Dataset.from_tensors((x, y)).repeat())

    def calls(n):
        for _ in range(int(n)):
            model.train_function(iterator)

    return model, steps, calls


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def seconds(call, *args):
    """Time of one call, by the clock that was chosen."""
    begin = clock()
    call(*args)
    return clock() - begin


# Products.


def products_of(name):
    """`{label: f}`: `f(n)` computes `n` of them, one after the other, inside one graph."""
    problem = kc.problems.get(name)
    model = problem.compiled("sgd", jit_compile=False)
    x, y = batch_of(name)
    one = [1e-3 * tf.random.stateless_normal(w.shape, (0, i)) for i, w in enumerate(model.trainable_variables)]

    def gradient(v):
        # does not depend on v, and iterations of a loop that do not wait for one another run side by side
        with tf.control_dependencies(v):
            return kc.Linearization(model, x, y).gradient

    def again(function):
        """`function(v)` as a vector, `n` times: alone, the forward pass each time."""

        function = tf.autograph.experimental.do_not_convert(function)

        @tf.function
        def repeat(n):
            v = one
            for _ in tf.range(n):
                v = function(v)
            return v

        return repeat

    def in_one_linearization(operator):
        @tf.function(autograph=False)
        def repeat(n):
            A = operator(kc.Linearization(model, x, y))
            return tf.while_loop(lambda i, v: i < n, lambda i, v: (i + 1, A @ v), (0, one))[1]

        return repeat

    def conjugate_gradients(n):
        @tf.function(autograph=False)
        def solve():
            lin = kc.Linearization(model, x, y)
            solver = kc.ConjugateGradient(max_steps=n, progress_tolerance=0.0)
            return solver.solve(lin.gauss_newton() + 1.0 * Identity(), trees.negative(lin.gradient)).value

        return solve

    solvers = {}

    def iterations(n):
        solvers.setdefault(n, conjugate_gradients(n))()

    return {
        "gradient": again(gradient),
        "Hessian product": again(lambda v: kc.Linearization(model, x, y).hessian() @ v),
        "Gauss-Newton product": again(lambda v: kc.Linearization(model, x, y).gauss_newton() @ v),
        "amortized Hessian product": in_one_linearization(lambda lin: lin.hessian()),
        "amortized Gauss-Newton product": in_one_linearization(lambda lin: lin.gauss_newton()),
        "amortized CG iteration": iterations,
    }


def time_of_products(name, rounds):
    """`{label: [seconds in each round]}` of one product."""
    candidates, times, n = products_of(name), {}, 10
    for r in range(rounds + 1):
        for label, call in candidates.items():
            few, many = (n, 3 * n) if label == "amortized CG iteration" else (tf.constant(n), tf.constant(3 * n))
            if label.startswith("amortized"):
                value = (seconds(call, many) - seconds(call, few)) / (2 * n)
            else:
                value = seconds(call, few) / n
            if r:  # the round before the first traces and warms up
                times.setdefault(label, []).append(value)
    return times


# Rows of the Jacobian.


def rows_of(batch=128):
    """`{label: f}` on the MLP with one output: `f(n)` computes `n` of them, one after the other, inside one graph."""
    keras.utils.set_random_seed(0)
    relu = lambda: keras.layers.Dense(512, activation="relu")  # noqa: E731
    model = kc.curved(keras.Sequential([keras.Input((784,)), relu(), relu(), keras.layers.Dense(1)]))
    model.compile(kc.GaussNewton(learning_rate=1e-3, damping=1.0, solver="rows"), "mse", jit_compile=False)
    x, y = tf.random.stateless_normal([batch, 784], (0, 1)), tf.random.stateless_normal([batch, 1], (0, 2))
    model.optimizer.build(model.trainable_variables)
    model.compute_loss(x, y, model(x))
    model.make_train_function()
    step = tf.autograph.experimental.do_not_convert(model.train_step)

    def linearized():
        return kc.Linearization(model, x, y, needs=model.optimizer.needs)

    def repeated(function):
        function = tf.autograph.experimental.do_not_convert(function)

        @tf.function
        def repeat(n):
            total = tf.zeros([])
            for _ in tf.range(n):
                with tf.control_dependencies([total]):  # one after the other
                    total += tf.add_n([tf.reduce_sum(a) for a in function()])
            return total

        return repeat

    @tf.function
    def steps(n):
        for _ in tf.range(n):
            step((x, y))

    return {
        "gradient": repeated(lambda: linearized().gradient),
        "Gram matrix by layers": repeated(lambda: [linearized().rows().gram()]),
        "GaussNewton step by rows": steps,
    }


def report_rows(rounds, say):
    candidates, times, n = rows_of(), {}, 20
    for r in range(rounds + 1):
        for label, call in candidates.items():
            begin = time.process_time()
            call(tf.constant(n))
            if r:
                times.setdefault(label, []).append((time.process_time() - begin) / n)
    say(f"\n{'':<31} {'CPU ms':>8} {'gradient = 1':>13}  {'target':<12}")
    for label in times:
        ratio, milliseconds = ratios(times, label, "gradient"), 1e3 * statistics.median(times[label])
        say(f"{label:<31} {milliseconds:>8.2f} {ratio:>13.2f}  {verdict(ratio, ROWS_TARGETS.get(label)):<12}")


# Passes.

PASSES = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv2DBackpropInput",
          "Conv2DBackpropFilter")  # fmt: skip


def count_passes(steps):
    """`(always, in branches)`: products of matrices and convolutions in the body of the traced loop over steps."""
    graph = steps.get_concrete_function(tf.constant(1)).graph.as_graph_def()
    library = {f.signature.name: f for f in graph.library.function}
    (loop,) = [n for n in graph.node if n.op in ("While", "StatelessWhile")]
    return _count(library[loop.attr["body"].func.name], library)


def _count(function, library):
    nodes = {n.name: n for n in function.node_def}
    ends = [*function.ret.values(), *function.control_ret.values()]
    waiting, reached = [_node(e) for e in ends], set()
    while waiting:
        name = waiting.pop()
        if name in nodes and name not in reached:
            reached.add(name)
            waiting.extend(_node(i) for i in nodes[name].input)
    always = branches = 0
    for node in (nodes[name] for name in reached):
        always += node.op in PASSES
        for key, value in node.attr.items():
            for called in [value.func, *value.list.func]:
                if called.name in library:
                    inner = _count(library[called.name], library)
                    if key == "f":  # a call
                        always, branches = always + inner[0], branches + inner[1]
                    else:  # a branch of a condition, the body of a loop
                        branches += sum(inner)
    return always, branches


def _node(reference):
    return reference.lstrip("^").split(":")[0]


# Memory, in a process of its own.


def memory_of(name, optimizer):
    """MB of a step at its peak."""
    command = [sys.executable, os.path.abspath(__file__), "--child", name, optimizer]
    # with two arenas only, freed memory is found again, whatever the threads
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "2"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def slots_of(model):
    """The optimizer's state, in copies of the weights."""
    weights = sum(int(w.value.shape.num_elements()) for w in model.trainable_variables)
    return sum(int(v.value.shape.num_elements()) for v in model.optimizer.variables) / weights


def child(name, optimizer):
    """Print what `memory_of` reads."""
    model, steps, _ = step_of(name, optimizer)
    steps(tf.constant(0))  # traced and optimized, not run
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins again from here
    before = _resident("VmRSS")
    steps(tf.constant(5))
    peak = _resident("VmHWM")
    print((peak - before) / 2**10)


def _resident(what):
    """Resident memory of this process in kB, now ("VmRSS") or at its peak ("VmHWM"); Linux says so."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(what)).split()[1])


# The report.


def ratios(times, of, to):
    """Median over the rounds of the ratio within each."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def verdict(ratio, target):
    """The target and whether it is reached."""
    return "" if target is None else f"<= {target:.2f} {'yes' if ratio <= target else 'NO'}"


def report_stalls(name, candidates, rounds, figure, say):
    """Percentiles of the times of single steps, with at least two of the longest periods for each optimizer."""
    steps, times = {o: max(2 * OPTIMIZERS[o][2], 20 * rounds) for o in candidates}, {o: [] for o in candidates}
    for turn in range(max(steps.values())):
        for optimizer, (_, _, calls) in candidates.items():
            if turn < steps[optimizer]:
                times[optimizer].append(seconds(calls, 1))
    unit = statistics.median(times["SGD"])
    say(f"\n{'single steps, SGD = 1':<22} {'median':>8} {'p99':>8} {'longest':>8}  longest / median")
    for optimizer, seen in times.items():
        median, p99, longest = (np.percentile(seen, q) / unit for q in (50, 99, 100))
        say(f"{optimizer:<22} {median:>8.2f} {p99:>8.2f} {longest:>8.2f}  {longest / median:.1f}")
    if figure:
        _draw_percentiles({o: np.array(seen) / unit for o, seen in times.items()}, f"{figure}_{name}.png")


def _draw_percentiles(times, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    q = np.linspace(0, 100, 401)
    for optimizer, seen in times.items():
        axis.plot(q, np.percentile(seen, q), label=optimizer)
    axis.set(xlabel="percentile of the steps", ylabel="time of a step, SGD = 1", yscale="log")
    axis.legend()
    figure.savefig(path)


def report_steps(name, optimizers, rounds, memory, say):
    """The table of steps; gives the candidates, traced and warm."""
    candidates = {o: step_of(name, o) for o in optimizers}
    times, graph_times = {}, {}
    for r in range(rounds + 1):
        for optimizer, (_, steps, calls) in candidates.items():
            n = OPTIMIZERS[optimizer][2]
            as_fit, inside = seconds(calls, n) / n, seconds(steps, tf.constant(n)) / n
            if r:
                times.setdefault(optimizer, []).append(as_fit)
                graph_times.setdefault(optimizer, []).append(inside)
    head = f"{'':<22} {'ms/step':>9} {'SGD = 1':>8}  {'target':<12} {'in graph':>8}"
    say(f"{head} {'passes':>8} {'slots':>6} {'B/weight':>8} {'peak MB':>8}")
    for optimizer, (model, steps, _) in candidates.items():
        always, branches = count_passes(steps)
        passes = f"{always}+{branches}" if branches else f"{always}"
        peak, slots = f"{memory_of(name, optimizer):.0f}" if memory else "-", slots_of(model)
        ratio, milliseconds = ratios(times, optimizer, "SGD"), 1e3 * statistics.median(times[optimizer])
        target = verdict(ratio, TARGETS.get((optimizer, name)))
        inside = ratios(graph_times, optimizer, "SGD")
        line = f"{optimizer:<22} {milliseconds:>9.2f} {ratio:>8.2f}  {target:<12} {inside:>8.2f}"
        say(f"{line} {passes:>8} {slots:>6.2f} {4 * slots:>8.1f} {peak:>8}")
    return candidates


def report_products(name, rounds, say):
    times = time_of_products(name, rounds)
    say(f"\n{'':<31} {'ms':>8} {'gradient = 1':>13}  {'target':<12}")
    for label in times:
        ratio, milliseconds = ratios(times, label, "gradient"), 1e3 * statistics.median(times[label])
        say(f"{label:<31} {milliseconds:>8.2f} {ratio:>13.2f}  {verdict(ratio, TARGETS.get((label, name))):<12}")
    ratio = ratios(times, "amortized CG iteration", "Gauss-Newton product")
    amortized = ratios(times, "amortized CG iteration", "amortized Gauss-Newton product")
    verdict_of = verdict(ratio, CG_TARGET)
    say(f"one CG iteration is {ratio:.2f} Gauss-Newton products, target {verdict_of}; {amortized:.2f} amortized ones")


@contextlib.contextmanager
def printing(out):
    """Gives a function that prints a line; at the end, what it has printed is written to the file `out` too, if any."""
    lines = []

    def say(line=""):
        print(line, flush=True)
        lines.append(line)

    yield say
    if out:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        with open(out, "w") as file:
            file.write("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Time, memory and passes of a step.")
    parser.add_argument("--out", help="write what is printed to this file too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="besides SGD"
    )
    parser.add_argument("--only_steps", action="store_true", help="no peak memory, no products")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what `ms/step` and ratios are of")
    parser.add_argument("--stalls", action="store_true", help="percentiles of single steps too")
    parser.add_argument("--figure", help="with `--stalls`: draw all percentiles to FIGURE_<problem>.png")
    parser.add_argument("--only_rows", action="store_true", help="nothing but the rows of the Jacobian")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    global clock
    clock = CLOCKS[args.clock]
    with printing(args.out) as say:
        report(args, say)


def report(args, say):
    """The tables that are asked for."""
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_curvature {kc.__version__}"
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    say(f"{versions}; {machine}, graph mode, {args.rounds} rounds, {args.clock} time")
    if args.only_rows:
        report_rows(args.rounds, say)
        return
    say(f"slots in copies of the weights, without step counters; HessianFree with {CG_STEPS} iterations in every step")
    say(f"slots to have: {', '.join(f'{name} {copies}' for name, copies in SLOTS.items())}, and iterates in a step")
    for name in args.problems:
        count = trees.count([w.value for w in kc.problems.get(name).model(0).trainable_variables])
        say(f"\n== {name}, batch {PROBLEMS[name]}, {count} weights ({4 * count / 2**20:.1f} MB)\n")
        names = list(dict.fromkeys(["SGD", *args.optimizers]))
        candidates = report_steps(name, names, args.rounds, not args.only_steps, say)
        if args.stalls:
            report_stalls(name, candidates, args.rounds, args.figure, say)
        if not args.only_steps:
            report_products(name, args.rounds, say)
    if not args.only_steps:
        report_rows(args.rounds, say)


if __name__ == "__main__":
    main()
