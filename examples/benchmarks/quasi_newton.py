"""Quasi-Newton methods on three kinds of problems, in float64.

    python examples/benchmarks/quasi_newton.py counts          # usual functions: evaluations to a gradient of 1e-8
    python examples/benchmarks/quasi_newton.py logistic        # on scikit-learn's sets, beside SciPy's L-BFGS-B
    python examples/benchmarks/quasi_newton.py pinn            # a Poisson problem, five seeds, 3000 steps
    python examples/benchmarks/quasi_newton.py pinn --float32  # what single precision costs

Counts are of evaluations of loss and gradient, the start included; they do not depend on the machine. An error of
`pinn` is that of the network against the solution in L2, relative, on a grid of 100 x 100 points.
"""

import argparse

import keras
import numpy as np
import scipy.optimize
import sklearn.datasets
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


def generated(condition, examples=500, features=20):
    """`(x, classes)`: inputs whose second moments have this condition number."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.standard_normal((examples, features)))[0]
    V = np.linalg.qr(random.standard_normal((features, features)))[0]
    x = np.sqrt(examples) * U @ np.diag(np.logspace(0, -np.log10(condition) / 2, features)) @ V.T
    return x, (x @ random.standard_normal(features) * 3 + random.logistic(size=examples) > 0).astype(int)


def by_scipy(x, y, classes, l2):
    """`(minimum, evaluations)` of SciPy's L-BFGS-B with ten pairs, from zero; evaluations to 1e-8 of the minimum."""
    values = []

    def loss(v):
        W = v.reshape(x.shape[1] + 1, classes)
        z = x @ W[:-1] + W[-1]
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        values.append(-np.mean(np.log(p[np.arange(len(x)), y])) + 0.5 * l2 * np.sum(W[:-1] ** 2))
        p[np.arange(len(x)), y] -= 1
        return values[-1], np.concatenate([x.T @ p / len(x) + l2 * W[:-1], p.sum(0, keepdims=True) / len(x)]).ravel()

    options = {"maxiter": 10000, "maxfun": 10000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 10}
    scipy.optimize.minimize(loss, np.zeros((x.shape[1] + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    return min(values), first(values)


def first(values, lowest=None):
    """The place of the first value within 1e-8 of the lowest."""
    lowest = min(values) if lowest is None else lowest
    return 1 + int(np.argmax(np.array(values) - lowest <= 1e-8 * abs(lowest)))


def logistic():
    """Softmax regression with the regularization of scikit-learn's default, `C = 1`."""
    digits, iris = (load(return_X_y=True) for load in (sklearn.datasets.load_digits, sklearn.datasets.load_iris))
    sets = {"digits": (digits[0] / 16, digits[1]), "iris": iris}
    sets |= {f"condition {c:g}": generated(c) for c in (1e2, 1e4, 1e6)}
    print(f"{'evaluations to 1e-8':20}{'SciPy':>8}{'LBFGS':>8}{'end, relative':>16}")
    for name, (x, y) in sets.items():
        classes, l2 = int(y.max()) + 1, 1.0 / len(x)
        minimum, theirs = by_scipy(x, y, classes, l2)
        inputs = keras.Input((x.shape[1],))
        dense = keras.layers.Dense(classes, kernel_initializer="zeros", kernel_regularizer=L2(0.5 * l2))
        model = kc.curved(keras.Model(inputs, dense(inputs)))
        model.compile(kc.LBFGS(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        history = trained(model, x, y, 1e-8, 1000)
        losses, evaluations = history["loss"][1:], 1 + np.cumsum(history["evaluations"])  # a loss is that before a step
        ours = evaluations[first(losses, minimum) - 1]
        print(f"{name:20}{theirs:8d}{ours:8.0f}{min(losses) / minimum - 1:16.1e}", flush=True)


# A physics-informed network.


def pinn(steps, seeds, methods):
    """Poisson's equation in the unit square, the network and grid of energy natural gradients."""
    problem = problems.poisson()
    x, y = problem.data()
    print(f"{'error in L2':20}" + "".join(f"{f'seed {seed}':>11}" for seed in range(seeds)) + f"{'evaluations':>14}")
    for name in methods:
        make, errors, evaluations = METHODS[name], [], []
        for seed in range(seeds):
            model = kc.curved(problem.compiled(make(), seed=seed))
            stop = kc.callbacks.Converged(gradient=0.0, patience=5, verbose=0)
            history = model.fit(x, y, batch_size=len(x), epochs=steps, verbose=0, callbacks=[stop]).history
            errors.append(problems.relative_error(model))
            evaluations.append(sum(history["evaluations"]))
        row = "".join(f"{error:11.1e}" for error in errors)
        print(f"{name:20}{row}{np.median(evaluations):14.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", choices=["counts", "logistic", "pinn"])
    parser.add_argument("--steps", type=int, default=3000, help="steps of `pinn`, in each run")
    parser.add_argument("--seeds", type=int, default=5, help="runs of `pinn`")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="of `pinn`; default: all")
    parser.add_argument("--float32", action="store_true", help="compute in single precision")
    arguments = parser.parse_args()
    keras.config.set_floatx("float32" if arguments.float32 else "float64")
    if arguments.problem == "pinn":
        pinn(arguments.steps, arguments.seeds, arguments.methods)
    else:
        {"counts": counts, "logistic": logistic}[arguments.problem]()


if __name__ == "__main__":
    main()
