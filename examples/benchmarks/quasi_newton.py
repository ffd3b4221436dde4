"""Quasi-Newton methods on four kinds of problems, in float64.

    python examples/benchmarks/quasi_newton.py counts          # usual functions: evaluations to a gradient of 1e-8
    python examples/benchmarks/quasi_newton.py logistic        # on scikit-learn's sets, beside SciPy's L-BFGS-B: means
                                                               # over `--runs` copies that differ by rounding
    python examples/benchmarks/quasi_newton.py pinn            # a Poisson problem, five seeds, 3000 steps
    python examples/benchmarks/quasi_newton.py stages          # convection, reaction, wave: Adam, L-BFGS, NysNewton-CG

`pinn` and `stages` take `--float32`, to see what single precision costs, and `--log FILE`: runs whose results are in
the file are not repeated.

Counts are of evaluations of loss and gradient, the start included; they do not depend on the machine. An error of
`pinn` is that of the network against the solution in L2, relative, on a grid of 100 x 100 points.
"""

import argparse
import json
import pathlib

import keras
import numpy as np
import scipy.optimize
import sklearn.datasets
import tensorflow as tf
from keras import ops

import keras_curvature as kc
from keras_curvature import problems

METHODS = {
    "LBFGS": kc.LBFGS, "LBFGS StrongWolfe": lambda: kc.LBFGS(search=kc.StrongWolfe()), "BFGS": kc.BFGS,
    "BFGS self-scaled": lambda: kc.BFGS(scaling="self_scaled"), "BFGS broyden": lambda: kc.BFGS(scaling="broyden"),
}  # fmt: skip
FUNCTIONS = {
    "Rosenbrock": (lambda w: 100.0 * (w[1] - w[0] ** 2) ** 2 + (1.0 - w[0]) ** 2, (-1.2, 1.0)),
    "Himmelblau": (lambda w: (w[0] ** 2 + w[1] - 11.0) ** 2 + (w[0] + w[1] ** 2 - 7.0) ** 2, (1.0, 1.0)),
    "Beale": (
        lambda w: sum((c - w[0] * (1 - w[1] ** k)) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))), (1.0, 1.0)
    ),
    "Matyas": (lambda w: 0.26 * (w[0] ** 2 + w[1] ** 2) - 0.48 * w[0] * w[1], (2.0, -1.0)),
}  # fmt: skip


class OfWeights(keras.layers.Layer):
    """A layer whose output is a function of its weights."""

    def __init__(self, function, start):
        super().__init__()
        self.function, self.start = function, np.asarray(start)

    def build(self, shape):
        self.w = self.add_weight(shape=self.start.shape, initializer="zeros")
        self.w.assign(self.start)

    def call(self, x):
        return 0.0 * x + self.function(self.w)


class L2(keras.regularizers.Regularizer):
    """Keras' own rounds its coefficient to float32, which shows in the seventh digit."""

    def __init__(self, coefficient):
        self.coefficient = coefficient

    def __call__(self, w):
        return self.coefficient * ops.sum(ops.square(w))


def counts():
    """Evaluations on functions of two weights."""
    print(f"{'':20}" + "".join(f"{name:>12}" for name in FUNCTIONS))
    one = np.ones((1, 1))
    for name, make in METHODS.items():
        row = []
        for function, start in FUNCTIONS.values():
            inputs = keras.Input((1,))
            model = kc.curved(keras.Model(inputs, OfWeights(function, start)(inputs)))
            model.compile(make(), loss=lambda y, output: output[:, 0])
            row.append(1 + sum(trained(model, one, one, 1e-8, 200)["evaluations"]))
        print(f"{name:20}" + "".join(f"{count:12.0f}" for count in row), flush=True)


def trained(model, x, y, gradient, epochs):
    """The history of training on all examples at once, until the gradient is that small."""
    stop = kc.callbacks.Converged(gradient=gradient, verbose=0)
    return model.fit(x, y, batch_size=len(x), epochs=epochs, verbose=0, callbacks=[stop]).history


# Logistic regression.

NEAR = 1e-8  # of the minimum, relatively


def generated(condition, examples=500, features=20):
    """`(x, classes)`: inputs whose second moments have this condition number."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.standard_normal((examples, features)))[0]
    V = np.linalg.qr(random.standard_normal((features, features)))[0]
    x = np.sqrt(examples) * U @ np.diag(np.logspace(0, -np.log10(condition) / 2, features)) @ V.T
    return x, (x @ random.standard_normal(features) * 3 + random.logistic(size=examples) > 0).astype(int)


def by_scipy(x, y, classes, l2):
    """`(minimum, evaluations to 1e-8 of it, norm of the first gradient)` of L-BFGS-B with ten pairs, from zero."""
    values, norms = [], []

    def loss(v):
        W = v.reshape(x.shape[1] + 1, classes)
        z = x @ W[:-1] + W[-1]
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        values.append(-np.mean(np.log(p[np.arange(len(x)), y])) + 0.5 * l2 * np.sum(W[:-1] ** 2))
        p[np.arange(len(x)), y] -= 1
        g = np.concatenate([x.T @ p / len(x) + l2 * W[:-1], p.sum(0, keepdims=True) / len(x)]).ravel()
        norms.append(np.linalg.norm(g))
        return values[-1], g

    options = {"maxiter": 10000, "maxfun": 10000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 10}
    scipy.optimize.minimize(loss, np.zeros((x.shape[1] + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    near = np.array(values) - min(values) <= NEAR * abs(min(values))
    return min(values), 1 + int(np.argmax(near)), norms[0]


def regression(features, classes, l2, optimizer):
    """A function from `(x, y, minimum)` to `(evaluations to 1e-8 of the minimum, the lowest loss)`, from zero."""
    inputs = keras.Input((features,))
    dense = keras.layers.Dense(classes, kernel_initializer="zeros", kernel_regularizer=L2(0.5 * l2))
    model = kc.curved(keras.Model(inputs, dense(inputs)))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    optimizer.build(model.trainable_variables)
    state = [*model.trainable_variables, *optimizer.variables]
    begin = [variable.numpy() for variable in state]

    def run(x, y, minimum):
        for variable, value in zip(state, begin):
            variable.assign(value)
        evaluations, reached, lowest, logs = 1, None, np.inf, {}
        while logs.get("gradient_max", 1.0) > 1e-8 and evaluations < 1000:
            model.reset_metrics()
            logs = model.train_on_batch(x, y, return_dict=True)
            lowest = min(lowest, logs["loss"])  # a loss is that before a step
            if reached is None and lowest - minimum <= NEAR * abs(minimum):
                reached = evaluations
            evaluations += int(logs["evaluations"])
        return reached, lowest

    return run


def logistic(arguments):
    """Softmax regression with the regularization of scikit-learn's default, `C = 1`."""
    digits, iris = (load(return_X_y=True) for load in (sklearn.datasets.load_digits, sklearn.datasets.load_iris))
    sets = {"digits": (digits[0] / 16, digits[1]), "iris": iris}
    sets |= {f"condition {c:g}": generated(c) for c in (1e2, 1e4, 1e6)}
    print(f"{'evaluations to 1e-8':20}{'SciPy':>20}{'LBFGS':>20}{'as SciPy':>20}{'LBFGS ends, relative':>24}")
    for name, (x, y) in sets.items():
        classes, l2 = int(y.max()) + 1, 1.0 / len(x)
        norm = by_scipy(x, y, classes, l2)[2]
        # SciPy's first length is 1, and its search has this constant
        as_scipy = kc.LBFGS(search=kc.StrongWolfe(decrease=1e-3), initial_scale=1.0 / norm)
        ours = [regression(x.shape[1], classes, l2, optimizer) for optimizer in (kc.LBFGS(), as_scipy)]
        counts, ends = [], []
        for seed in range(arguments.runs):
            noise = 1e-10 * np.random.default_rng(seed).standard_normal(x.shape) * (seed > 0)
            same = x * (1 + noise)
            minimum, theirs, _ = by_scipy(same, y, classes, l2)
            found = [run(same, y, minimum) for run in ours]
            counts.append([theirs, *[count for count, _ in found]])
            ends.append(found[0][1] / minimum - 1)
        cells = [f"{np.mean(of):.1f} ({min(of)}-{max(of)})" for of in zip(*counts)]
        print(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells) + f"{max(ends):24.1e}", flush=True)


# Physics-informed networks.


class Log:
    """Results by name, in a file of JSON lines if there is one."""

    def __init__(self, path):
        self.path = None if path is None else pathlib.Path(path)
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.known = {line["run"]: line for line in map(json.loads, lines)}

    def once(self, run, compute):
        """What `compute()` returns, a dictionary; not computed if the file has it."""
        if run not in self.known:
            self.known[run] = {"run": run, **compute()}
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.known[run]) + "\n")
        return self.known[run]


def steps_of(model, problem, optimizer, steps):
    """Train a model on all points at once; the history of one epoch of so many steps."""
    batches = tf.data.Dataset.from_tensors(problem.data()).repeat()
    model.compile(optimizer, loss=problem.loss(), jit_compile=False)
    return model.fit(batches, steps_per_epoch=steps, verbose=0).history


def pinn(arguments):
    """Poisson's equation in the unit square, the network and grid of energy natural gradients."""
    problem, log, seeds = problems.poisson(), Log(arguments.log), range(arguments.seeds)
    print(f"{'error in L2':20}" + "".join(f"{f'seed {seed}':>11}" for seed in seeds) + f"{'evaluations':>14}")

    def run(name, seed):
        model = kc.curved(problem.model(seed))
        if arguments.adam:
            steps_of(model, problem, keras.optimizers.Adam(1e-3), arguments.adam)
        evaluations = steps_of(model, problem, METHODS[name](), arguments.steps)["evaluations"][0]
        return {"error": problems.relative_error(model), "evaluations": evaluations}

    for name in arguments.methods:
        key = f"poisson {name} {arguments.adam}+{arguments.steps} {keras.config.floatx()}"
        found = [log.once(f"{key} {seed}", lambda name=name, seed=seed: run(name, seed)) for seed in seeds]
        row = "".join(f"{one['error']:11.1e}" for one in found)
        print(f"{name:20}{row}{np.median([one['evaluations'] for one in found]):14.0f}", flush=True)


EQUATIONS = ("convection", "reaction", "wave")
# name: (optimizer, the argument with its steps)
STAGES = {
    "Adam": (lambda: keras.optimizers.Adam(1e-3), "adam"),
    "L-BFGS": (lambda: kc.LBFGS(memory=100), "steps"),
    "NysNewton-CG": (
        lambda: kc.NysNewtonCG(
            rank=60, damping=1e-3,
            solver=kc.ConjugateGradient(max_steps=100, progress_tolerance=0.0, residual_tolerance=1e-8),
        ), "newton",
    ),
}  # fmt: skip


def stages(arguments):
    """Errors after each of three methods, one after the other on the same network."""
    log = Log(arguments.log)
    print(f"{'error in L2, relative':24}" + "".join(f"{stage:>14}" for stage in STAGES))
    for name in arguments.equations:
        problem = getattr(problems, name)(points=arguments.points, width=arguments.width)

        def run(problem=problem):
            model, errors, losses = kc.curved(problem.model(0)), {}, {}
            for stage, (make, steps) in STAGES.items():
                steps_of(model, problem, make(), getattr(arguments, steps))
                errors[stage] = problems.relative_error(model)
                losses[stage] = float(model.evaluate(*problem.data(), batch_size=problem.batch_size, verbose=0))
            return {"error": errors, "loss": losses}

        protocol = f"{arguments.points} {arguments.width} {arguments.adam}+{arguments.steps}+{arguments.newton}"
        found = log.once(f"{name} {protocol} {keras.config.floatx()}", run)
        for what in ("error", "loss"):
            row = "".join(f"{found[what][stage]:14.1e}" for stage in STAGES)
            print(f"{name + ' ' * 8 + what:24}{row}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", choices=["counts", "logistic", "pinn", "stages"])
    parser.add_argument("--steps", type=int, default=3000, help="quasi-Newton steps of `pinn` and `stages`")
    parser.add_argument("--adam", type=int, default=0, help="steps of Adam before")
    parser.add_argument("--newton", type=int, default=200, help="steps of NysNewton-CG after")
    parser.add_argument("--points", type=int, default=1000, help="points inside, of `stages`; the paper: 10000")
    parser.add_argument("--width", type=int, default=50, help="width of the network of `stages`; the paper: 200")
    parser.add_argument("--equations", nargs="*", default=EQUATIONS, choices=EQUATIONS, help="of `stages`")
    parser.add_argument("--runs", type=int, default=4, help="copies of each set of `logistic`")
    parser.add_argument("--seeds", type=int, default=5, help="runs of `pinn`")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="of `pinn`; default: all")
    parser.add_argument("--float32", action="store_true", help="compute in single precision")
    parser.add_argument("--log", help="file that results are added to, and read from")
    arguments = parser.parse_args()
    keras.config.set_floatx("float32" if arguments.float32 else "float64")
    {"counts": lambda _: counts(), "logistic": logistic, "pinn": pinn, "stages": stages}[arguments.problem](
        arguments
    )


if __name__ == "__main__":
    main()
