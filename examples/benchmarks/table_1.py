"""Table 1 of the CurveBall paper: iterations until the loss of a small hard problem is below 1e-4.

    python examples/benchmarks/table_1.py | tee examples/benchmarks/results/table_1.txt

The protocol is that of the code behind the table (see `keras_curvature/problems/table_1.py`): 100 starts; the loss
is taken before the update, with that iteration's noise. Runs that never reach the loss are left out of the mean. Other
rows are quoted from the paper. `--grid` searches the settings of SGD and Adam over the grid of that code.
"""

import argparse
import itertools

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import CurvatureOptimizer, CurveBall, Linearization, problems

COLUMNS = {"deterministic": "rosenbrock", "U[0, 1]": "rosenbrock_noise_1", "U[0, 3]": "rosenbrock_noise_3"}
COLUMNS["Rahimi-Recht"] = "rahimi_recht"
RATES = (1e-1, 5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5)

# mean and deviation over the runs that converged, as the paper prints them
PUBLISHED = {
    "SGD + momentum": ("370 +- 40", "846 +- 217", "4069 +- 565", "95 +- 2"),
    "Adam": ("799 +- 160.5", "1290 +- 476", "2750 +- 257", "95 +- 5"),
    "Levenberg-Marquardt": ("16 +- 4", "8 +- 3", "11 +- 5", "9 +- 4"),
    "BFGS": ("19 +- 4", "44 +- 21", "63 +- 29", "43 +- 21"),
    "CurveBall": ("13 +- 0.5", "12 +- 1", "13 +- 1", "35 +- 11"),
}

# the settings of our rows, one for each column; of SGD and Adam the best that `--grid` found, from five starts
OURS = {
    "SGD + momentum": (keras.optimizers.SGD, [
        {"learning_rate": 1e-3, "momentum": 0.95}, {"learning_rate": 5e-4, "momentum": 0.95},
        {"learning_rate": 1e-4, "momentum": 0.95}, {"learning_rate": 1e-1, "momentum": 0.9},
    ]),
    "Adam": (keras.optimizers.Adam, [
        {"learning_rate": 1e-1, "beta_2": 0.99}, {"learning_rate": 5e-2, "beta_2": 0.99},
        {"learning_rate": 5e-3, "beta_1": 0.99, "beta_2": 0.99}, {"learning_rate": 1e-1},
    ]),
    "CurveBall": (CurveBall, [{"learning_rate": 0.5, "damping": 0.1}] * 3 + [{"learning_rate": 1.0, "damping": 1.0}]),
}  # fmt: skip


class Runner:
    """Runs one problem from many starts on one model and one traced graph.

    Args:
        name: key of a problem.
        optimizer: of Keras or of `keras_curvature`.

    Attributes:
        limit: most iterations of a run.
    """

    def __init__(self, name, optimizer):
        self.problem, self.optimizer = problems.get(name), optimizer
        self.full_batch = name == "rahimi_recht"
        self.limit = 1000 if self.full_batch else 5000
        self.model = self.problem.compiled(optimizer)
        optimizer.build(self.model.trainable_variables)
        self._fresh = [v.numpy() for v in optimizer.variables]
        self._run = tf.function(self._until_below)

    def iterations(self, run):
        """The 1-based index of the first iteration of the run with a loss below 1e-4, or None."""
        for variable, value in zip(self.optimizer.variables, self._fresh):
            variable.assign(value)
        if self.full_batch:
            x, y = self.problem.data()
            self.model.set_weights(self.problem.model(seed=run).get_weights())
        else:
            x, y = self.problem.data(samples=self.limit, seed=run)
            self.model.set_weights([problems.table_1_starts(run + 1)[run]])
        t, loss = self._run(tf.constant(x), tf.constant(y))
        return int(t) if loss < 1e-4 else None

    def _until_below(self, x, y):
        """`(t, loss)`: number and loss of the first iteration below 1e-4, or of the last one."""

        def iterate(t, _):
            batch = (x, y) if self.full_batch else (x[t : t + 1], y[t : t + 1])
            lin = Linearization(self.model, *batch)
            loss, gradient = lin.loss, lin.gradient
            if isinstance(self.optimizer, CurvatureOptimizer):
                self.optimizer.step(lin)
            else:
                self.optimizer.apply(gradient, lin.variables)
            return t + 1, loss

        return tf.while_loop(
            lambda t, loss: (t < self.limit) & (loss >= 1e-4), iterate, (0, tf.constant(np.inf, x.dtype))
        )


def counts(name, optimizer, runs):
    """Iterations of each of `runs` runs, NaN where one did not converge."""
    runner = Runner(name, optimizer)
    return np.array([runner.iterations(run) or np.nan for run in range(runs)])


def cell(counts):
    """Mean and deviation over the converged runs, and how many did not."""
    converged = counts[~np.isnan(counts)]
    if not converged.size:
        return "none converged"
    failed = f" ({len(counts) - converged.size} not)" if converged.size < len(counts) else ""
    return f"{converged.mean():.1f} +- {converged.std():.1f}{failed}"


def line(name, whose, cells):
    """One row."""
    return f"{name:20}{whose:12}" + "".join(f"{text:>26}" for text in cells)


def settings(options):
    """`lr 0.001, momentum 0.95`."""
    return ", ".join(f"{name.replace('learning_rate', 'lr')} {value:g}" for name, value in options.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--grid", action="store_true", help="search the settings of SGD and Adam, and stop")
    arguments = parser.parse_args()
    keras.config.set_floatx("float64")
    if arguments.grid:
        grid(min(arguments.runs, 5))
        return
    print(f"Iterations until the loss is below 1e-4: mean +- deviation over {arguments.runs} starts")
    print(line("", "", COLUMNS))
    for name, cells in PUBLISHED.items():
        print(line(name, "paper", cells))
        if name in OURS:
            make, options = OURS[name]
            ours = [cell(counts(p, make(**o), arguments.runs)) for p, o in zip(COLUMNS.values(), options)]
            print(line("", "here", ours))
            print(line("", "", map(settings, options)), flush=True)


def grid(runs):
    """Every setting of the grid of the paper's code."""
    sgd = [{"learning_rate": r, "momentum": m} for r in RATES for m in (0.9, 0.95, 0.99)]
    adam = [
        {"learning_rate": r, "beta_1": b1, "beta_2": b2}
        for r, b1, b2 in itertools.product(RATES, (0.9, 0.99), (0.99, 0.999))
    ]
    for column, problem in COLUMNS.items():
        for name, options in (("SGD + momentum", sgd), ("Adam", adam)):
            for o in options:
                found = cell(counts(problem, OURS[name][0](**o), runs))
                print(f"{column:15}{name:16}{settings(o):40}{found}", flush=True)


if __name__ == "__main__":
    main()
