"""What you get without tuning: every optimizer of the package at its defaults, beside `keras.optimizers.Adam()`.

    pip install ".[examples]"
    python examples/benchmarks/defaults.py --out examples/benchmarks/results/defaults

Each method is built without arguments, and no setting of the table was changed for a problem. The problems are small
versions of what people train: dense networks of width 32 and 512, a convolutional network without and with batch
normalization, a transformer, an LSTM, and regression with targets of scale 0.001, 1 and 1000; with batches of 32 and
512 examples. It takes about an hour on two cores. Every finished run is a line of `defaults.jsonl`. After an
interruption the same command goes on with what is missing. At the end it writes the table; `--only_print` does
nothing else.

How it measures:

* A run is a fixed number of steps from one seed, with batches that the seed determines, in one thread, so that it can
  be repeated. Methods that solve or search in each step take `FEW` steps, on the small dense networks; all others
  `STEPS`.
* The score is the reduction of the training loss, divided by that of `Adam()` after the same steps from the same
  weights on the same batches. 1 is as good as Adam, 0 learnt nothing. The loss is that of the training set in training
  mode. A run fails if its score is below `ENOUGH`, or if it diverged: its loss at the end is not finite, or
  above that at the beginning.
* Validation loss is in inference mode. Its moving statistics of batch normalization lag in so short a run.
* Sharpness is the largest eigenvalue of the Hessian of the training loss at the end, in inference mode.

Two collections. `--collection tuning` has scikit-learn's digits, Friedman's first function and seed 0. The defaults of
the package were chosen with it, and docstrings that give shares of Adam's reduction of the loss are about it. `judged`,
the default, has generated images, another function and another seed. No default was chosen with it, except that one
was dropped because it diverged here (Eva at 0.03).

The table `results/defaults.txt` is about `judged`. A dash stands for a network that was not run: methods that solve or
search in each step have the small dense networks alone, `NaturalGradient`, whose 150 steps took minutes there, has no
larger ones either, and some others have no `mlp_512`.

* Methods for full batches (`LiSSA`, `Newton`, `NysNewtonCG`) diverge on some batches of 32.
* With targets of 1000, methods whose bounds are absolute hardly move (`IFShampoo`, `MFAC`, `SENG`, `SINGD`,
  `SquareRootFreeAdam`): scale the targets.
* On `mlp_512` with batches of 512, `CurveBall`, `DiagonalNewton`, `Eva`, `KLShampoo` and `Neumann` reduce the training
  loss less than Adam, and end with a lower validation loss.

`results/defaults_before.txt` was made before the defaults of AdaHessian, DiagonalNewton, ESGD, Neumann, Sophia and
SquareRootFreeAdam were changed.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf
from batch_scaling import add_line, batches, lines_of  # which stands beside this file
from keras import layers

import keras_curvature as kc
from keras_curvature import optimizers
from keras_curvature.problems import networks

tf.get_logger().setLevel("ERROR")  # a graph for every method, which TensorFlow takes for a mistake

STEPS, FEW = 150, 20
LOOKS = (1, 2, 5, 10, 20, 40, 80, 150)  # steps after which the loss of the training set is looked at
BATCHES = (32, 512)
ENOUGH = 0.9  # of Adam's reduction of the loss
ITERATIVE = (
    "BFGS", "GaussNewton", "HessianFree", "LBFGS", "LiSSA", "Newton", "NewtonCG", "NysNewtonCG", "SaddleFreeNewton",
    "TwoLoopNeumann",
)  # fmt: skip
DENSE = ("BFGS", "Newton")  # a matrix of all weights
SMALL = {**dict.fromkeys(ITERATIVE, ("mlp_32", "regression")), **dict.fromkeys(DENSE, ("regression",))}
METHODS = {
    "Adam": keras.optimizers.Adam,
    **{name: getattr(kc, name) for name in sorted(optimizers.__all__) if name != "CurvatureOptimizer"},
}  # fmt: skip
SEEDS = {"tuning": (0,), "judged": (1,)}


# The problems.


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its data, and the scales of its targets.

    Attributes:
        model: Of a seed.
        data: Of the name of the collection; `((x, y), (x, y))` of training and validation.
        loss: Of no arguments.
        scales: Factors on the targets.
    """

    model: Callable
    data: Callable
    loss: Callable = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    scales: tuple = (1.0,)


def halves(x, y, train=1024):
    """`((x, y), (x, y))`: the first examples, and the others."""
    return (x[:train], y[:train]), (x[train:], y[train:])


def images(collection, shape=(8, 8, 1)):
    """1024 images of 8 by 8 pixels and more for validation, ten classes."""
    if collection == "tuning":
        (x, y), validation = kc.problems.data("digits")
        x, y = np.concatenate([x[:1024], validation[0]]), np.concatenate([y[:1024], validation[1]])
    else:
        x, y = kc.problems.synthetic("images", 1536, seed=1, shape=(8, 8, 1))
    return halves(x.reshape(-1, *shape), y)


def tokens(collection):
    """The images in 16 patches of 2 by 2 pixels, each one of 16 tokens."""
    parts = images(collection, (4, 2, 4, 2))
    return tuple(((x.mean((2, 4)).reshape(-1, 16) * 15.99).astype("int32"), y) for x, y in parts)


def regression(collection):
    """Ten inputs, one target with mean 0 and variance 1: Friedman's first function, or one of waves and a product."""
    random = np.random.RandomState(0 if collection == "tuning" else 1)
    x = random.rand(1536, 10)
    if collection == "tuning":
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    else:
        y = np.cos(2 * np.pi * x[:, 0]) + 4 * x[:, 1] * x[:, 2] - np.exp(x[:, 3]) + np.abs(x[:, 4] - 0.5)
    y += 0.1 * y.std() * random.randn(len(y))
    x, y = (x - 0.5) * math.sqrt(12), (y - y.mean()) / y.std()
    return halves(x.astype("float32"), y[:, None].astype("float32"))


def dense(*widths, activation="relu"):
    """A dense network, of a seed."""
    hidden = [lambda w=w: layers.Dense(w, activation=activation) for w in widths[1:-1]]
    return kc.problems.seeded(
        lambda: keras.Sequential([keras.Input(widths[:1]), *[h() for h in hidden], layers.Dense(widths[-1])])
    )


def convolutional(normalized):
    """Two convolutions and a dense layer, of a seed: (batch, 8, 8, 1) -> (batch, 10)."""

    def build():
        stack = [keras.Input((8, 8, 1))]
        for filters, strides in ((16, 1), (32, 2)):
            stack.append(layers.Conv2D(filters, 3, strides, padding="same", use_bias=not normalized))
            stack += [layers.BatchNormalization()] if normalized else []
            stack.append(layers.ReLU())
        return keras.Sequential([*stack, layers.Flatten(), layers.Dense(10)])

    return kc.problems.seeded(build)


def recurrent():
    """An LSTM that reads the rows of an image: (batch, 8, 8) -> (batch, 10)."""
    return keras.Sequential([keras.Input((8, 8)), layers.LSTM(32, unroll=True), layers.Dense(10)])


def encoder():
    """A transformer of one block, of width 32: (batch, 16) -> (batch, 10)."""
    return networks.transformer(vocabulary=16, length=16, width=32, heads=2, blocks=1, classes=10)


def flat(collection):
    return images(collection, (64,))


def rows(collection):
    return images(collection, (8, 8))


PROBLEMS = {
    "mlp_32": Setting(dense(64, 32, 32, 10), flat),
    "mlp_512": Setting(dense(64, 512, 512, 10), flat),
    "cnn": Setting(convolutional(False), images),
    "cnn_bn": Setting(convolutional(True), images),
    "transformer": Setting(kc.problems.seeded(encoder), tokens),
    "lstm": Setting(kc.problems.seeded(recurrent), rows),
    "regression": Setting(
        dense(10, 32, 32, 1, activation="tanh"), regression, keras.losses.MeanSquaredError, scales=(1e-3, 1.0, 1e3)
    ),
}


# One method on one problem: one model and one traced graph for all its runs.


class Runner:
    """Runs of one method on one problem.

    Args:
        setting: A `Setting`.
        make: A function that returns the optimizer.
        collection: The name of the data.
    """

    def __init__(self, setting, make, collection):
        self.setting = setting
        (self.x, y), (self.x_new, y_new) = setting.data(collection)
        self.model, self.optimizer = setting.model(0), make()
        own = isinstance(self.optimizer, kc.CurvatureOptimizer)
        self.model = kc.curved(self.model) if own else self.model
        self.model.compile(self.optimizer, loss=setting.loss(), jit_compile=False)
        self.optimizer.build(self.model.trainable_variables)
        self.model.compute_loss(self.x[:1], y[:1], self.model(self.x[:1]))  # creates the metric, outside of loops
        self.model.make_train_function()
        self.targets = [tf.constant(y), tf.constant(y_new)]
        self._curvatures = {}
        self._fresh = [v.numpy() for v in self.optimizer.variables]
        self._step = tf.autograph.experimental.do_not_convert(self.model.train_step)  # as in Keras' train function
        signature = [tf.TensorSpec((None, None), "int32"), tf.TensorSpec([None, *y.shape[1:]], y.dtype)]
        self._steps = tf.function(self._several_steps, signature)
        self._loss = tf.function(lambda x, y, training: setting.loss()(y, self.model(x, training=training)))

    def run(self, size, scale, seed, last):
        """One run, a dictionary: the losses after each of `LOOKS` up to `last` steps, of validation, the sharpness."""
        for variable, value in zip(self.model.weights, self.setting.model(seed).get_weights()):
            variable.assign(value)
        for variable, value in zip(self.optimizer.variables, self._fresh):
            variable.assign(value)
        y, y_new = (self.targets[0], self.targets[1]) if scale == 1 else (scale * t for t in self.targets)
        stream, step, begin = batches(len(self.x), size, seed), 0, time.perf_counter()
        losses = [self._look(self.x, y, True)]
        for look in (n for n in LOOKS if n <= last):
            self._steps(tf.constant(np.stack([next(stream) for _ in range(look - step)])), y)
            step = look
            losses.append(self._look(self.x, y, True))
            if not math.isfinite(losses[-1]):
                break
        seconds, fine = time.perf_counter() - begin, math.isfinite(losses[-1])
        return {
            "batch": size, "scale": scale, "seed": seed,
            "losses": losses, "finite": fine, "validation": self._look(self.x_new, y_new, False),
            # none where it diverged: products at such weights may overflow
            "sharpness": self._sharpness(scale, y) if fine and losses[-1] <= losses[0] else None,
            "seconds": round(seconds, 2),
        }  # fmt: skip

    def _sharpness(self, scale, y):
        if scale not in self._curvatures:  # at the weights that the model has when it is asked
            self._curvatures[scale] = kc.curvature(self.model, (self.x[:256], y[:256]))
        return float(f"{float(self._curvatures[scale].sharpness().values[0]):.3g}")

    def _look(self, x, y, training):
        return float(f"{float(self._loss(x, y, training)):.5g}")

    def _several_steps(self, rows, y):
        for batch in rows:
            self._step((tf.gather(self.x, batch), tf.gather(y, batch)))


# All runs.


def cell(run):
    """What tells one run of a method from the others."""
    return run["problem"], run["batch"], run["scale"], run["seed"]


def train(path, names, problems, collection):
    """The missing runs of these methods on these problems."""
    warnings.filterwarnings("ignore", message=".*knows no Kronecker factors")
    done = {(run["method"], *cell(run)) for run in lines_of(path)}
    for problem in problems:
        for name in names:
            setting, last = PROBLEMS[problem], FEW if name in ITERATIVE else STEPS
            wanted = [(b, c, s) for b in BATCHES for c in setting.scales for s in SEEDS[collection]]
            missing = [w for w in wanted if (name, problem, *w) not in done]
            if not missing or problem not in SMALL.get(name, PROBLEMS):
                continue
            begin = time.perf_counter()
            runner = Runner(setting, METHODS[name], collection)
            for which in missing:
                add_line(path, {"method": name, "problem": problem, **runner.run(*which, last)})
            print(f"{problem:12} {name:20} {time.perf_counter() - begin:6.1f} s", flush=True)
            keras.backend.clear_session()


def score(run, adam):
    """The reduction of the loss over Adam's after as many steps; minus infinity for a run that diverged."""
    losses, steps = run["losses"], len(run["losses"])
    if not run["finite"] or losses[-1] > losses[0]:
        return -math.inf
    return (losses[0] - losses[-1]) / (adam["losses"][0] - adam["losses"][steps - 1])


def report(runs):
    """The lines of the table."""
    adam = {cell(run): run for run in runs if run["method"] == "Adam"}
    columns = list(dict.fromkeys((run["problem"], run["scale"]) for run in adam.values()))
    yield "Reduction of the training loss over Adam's in the same steps, batch 32 / 512 (the worst seed; x: diverged)"
    yield f"{'':20}" + "".join(f"{p if s == 1 else f'{p[:6]} {s:g}':>16}" for p, s in columns) + "   failed"
    for name in METHODS:
        found, failed = [], 0
        mine = [run for run in runs if run["method"] == name and cell(run) in adam]
        for problem, scale in columns:
            texts = []
            for size in BATCHES:
                here = [r for r in mine if (r["problem"], r["scale"], r["batch"]) == (problem, scale, size)]
                scores = [score(r, adam[cell(r)]) for r in here]
                failed += sum(s < ENOUGH for s in scores)
                texts.append(_text(scores))
            found.append(" / ".join(texts))
        if mine:
            yield f"{name:20}" + "".join(f"{text:>16}" for text in found) + f"{f'{failed} of {len(mine)}':>12}"
    yield ""
    yield "Medians over the runs, over Adam's: validation loss, sharpness; the highest loss seen, over the first"
    for name in METHODS:
        mine = [r for r in runs if r["method"] == name and r.get("sharpness") is not None and cell(r) in adam]
        if mine and name not in ITERATIVE:
            new = statistics.median(r["validation"] / adam[cell(r)]["validation"] for r in mine)
            sharp = statistics.median(r["sharpness"] / adam[cell(r)]["sharpness"] for r in mine)
            peak = max(max(r["losses"]) / r["losses"][0] for r in mine)
            yield f"{name:20}{new:8.2f}{sharp:8.2f}{peak:10.3g}"


def _text(scores):
    if not scores:
        return "-"
    return "x" if min(scores) == -math.inf else f"{min(scores):.2f}"


def main():
    parser = argparse.ArgumentParser(description="Every optimizer at its defaults, beside Adam.")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--collection", choices=list(SEEDS), default="judged")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--only_print", action="store_true")
    parser.add_argument("--out", default="defaults", help="the files' beginning")
    args = parser.parse_args()
    path = args.out + ".jsonl"
    if args.jobs == 1 and not args.only_print:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        train(path, args.methods, args.problems, args.collection)
        return
    if not args.only_print:
        this = [sys.executable, __file__, "--jobs", "1", "--out", args.out, "--collection", args.collection]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            commands = [[*this, "--problems", p, "--methods", *args.methods] for p in args.problems]
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_curvature {kc.__version__}"
    lines = [f"{versions}; {platform.machine()}; collection {args.collection}", *report(lines_of(path))]
    text = "\n".join(lines) + "\n"
    print(text)
    with open(args.out + ".txt", "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
