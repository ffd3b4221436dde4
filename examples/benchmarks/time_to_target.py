"""Training loss against steps and seconds: optimizers of the package beside Keras' SGD, Adam and Muon.

    pip install ".[examples]"
    python examples/benchmarks/time_to_target.py autoencoder --data_dir ~/tensorflow_datasets
    python examples/benchmarks/time_to_target.py cifar10 --data_dir ~/tensorflow_datasets
    python examples/benchmarks/time_to_target.py characters

`autoencoder` is the deep autoencoder of the Hessian-free literature (784-1000-500-250-30 and back, MNIST), `cifar10` a
small convolutional network with batch normalization, `characters` a causal transformer (two blocks of width 96) that
continues Python's own documentation. Every finished run is a line of `time_to_target_<problem>.jsonl`. After an
interruption the same command goes on with the run that was stopped. At the end it writes a table and a figure;
`--only_draw` draws them again without training.

How it measures:

* A run trains for a budget of seconds. Only steps count, not tracing and not the evaluation of the loss. The loss is
  that of a fixed sample of the training data, normalized by the statistics of the sample. The loss of as many
  examples that are not trained on stands beside it, and their accuracy, in inference mode.
* The learning rate falls linearly to zero over the budget, because rankings change when it does.
* Every method has the same grid of learning rates (two per decade), the same search rule and the same budget. All other
  settings are defaults, or those of `METHODS` below. The tables in `results/` have some of these methods: run the
  others with `--methods`. The rule: on one seed, run a fifth of the budget, starting from the rate nearest to the
  default, and move while the final loss is lower at a neighbouring rate. From there do the same with the whole budget,
  because short runs choose rates that are too low or too high for long ones. The best rate is run on two more seeds.
* The target is the final loss of the best of Keras' own optimizers, the median over its seeds. A time to target is the
  median over the seeds of the first evaluation at which the loss is at the target. A method that is faster could end
  its decay sooner: its time is an upper bound.
* `unconfigured` is the loss at the end of one more run, at a rate that does not fall: the default, for SGD 0.1.
* With `--threads 1` all computation is in one thread and the seconds are CPU time, which other work on the machine
  disturbs little. Otherwise they are wall time.
"""

import argparse
import dataclasses
import math
import os
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf
from batch_scaling import add_line, batches, lines_of, loss_of_logits  # which stands beside this file
from keras import layers

import keras_curvature as kc
from keras_curvature.problems import networks

tf.get_logger().setLevel("ERROR")  # a graph for every method, which TensorFlow takes for a mistake

RATES = tuple(float(f"{10 ** (k / 2):.2g}") for k in range(-9, 5))  # 0.000032 to 100
SEEDS = (0, 1, 2)
SCREENING = 0.2  # of the budget, for each rate of the grid
LOOKS = 40  # in a whole budget


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its data and the budget of a run."""

    title: str
    model: Callable  # of a seed
    data: Callable  # of a folder; ((x, y), (x, y)) of training and validation
    loss: Callable
    batch: int
    seconds: float
    sample: int = 2000  # training examples whose loss is looked at, and as many for validation
    classes: bool = True  # whether the outputs are logits of classes, so that there is an accuracy


def small_cnn():
    """Three convolutions with batch normalization and a dense layer: (batch, 32, 32, 3) in [0, 1] -> (batch, 10)."""
    stack = [keras.Input((32, 32, 3)), layers.Rescaling(4.0, offset=-2.0)]
    for filters in (16, 32, 32):
        stack += [layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False), layers.BatchNormalization()]
        stack += [layers.ReLU()]
    return keras.Sequential([*stack, layers.Flatten(), layers.Dense(10)])  # (batch, 4, 4, 32) before


def causal_transformer(characters=64, length=64, width=96, heads=4, blocks=2):
    """A decoder with normalization before each part: (batch, length) -> (batch, length, characters) logits."""
    inputs = keras.Input((length,), dtype="int32")
    x = networks.TokenAndPosition(characters, length, width)(inputs)  # (batch, length, width)
    for _ in range(blocks):
        x = networks.causal_block(x, heads)
    return keras.Model(inputs, layers.Dense(characters)(layers.LayerNormalization()(x)))


def text(length=64, characters=64):
    """Python's documentation in windows, each with the characters that follow: every tenth is for validation.

    A number is a character's rank by frequency; the rarest share the last number.
    """
    topics = pydoc_data.topics.topics
    letters = np.array(list("".join(topics[name] for name in sorted(topics))))
    values, places, counts = np.unique(letters, return_inverse=True, return_counts=True)
    rank = np.empty(len(values), "int32")
    rank[np.argsort(-counts, kind="stable")] = np.minimum(np.arange(len(values)), characters - 1)
    numbers = rank[places]
    count = (len(numbers) - 1) // length
    x, y = (numbers[shift : shift + count * length].reshape(count, length) for shift in (0, 1))
    validation = np.arange(count) % 10 == 9
    return (x[~validation], y[~validation]), (x[validation], y[validation])


_autoencoder = kc.problems.get("autoencoder")
PROBLEMS = {
    "autoencoder": Setting(
        "MNIST, deep autoencoder 784-1000-500-250-30", _autoencoder.model, _autoencoder.data,
        _autoencoder.loss, batch=250, seconds=30, classes=False,
    ),
    "cifar10": Setting(
        "CIFAR-10, small convolutional network with batch normalization", kc.problems.seeded(small_cnn),
        lambda folder: kc.problems.data("cifar10", folder), loss_of_logits, batch=128, seconds=15,
    ),
    "characters": Setting(
        "characters of Python's documentation, causal transformer of two blocks, width 96",
        kc.problems.seeded(causal_transformer), lambda folder: text(), loss_of_logits, batch=32, seconds=60,
        sample=256,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer at its defaults, but for what is said here.

    Attributes:
        make: The optimizer; its learning rate is where the search begins.
        kerass: Whether it is one of Keras' own.
        batch: Examples in a batch by problem, where that is not the problem's own.
        problems: Those that it runs on.
    """

    make: Callable
    kerass: bool = False
    batch: dict = dataclasses.field(default_factory=dict)
    problems: tuple = tuple(PROBLEMS)


# Keras' cross-entropy is the mean over 784 pixels where the papers sum, and so is its curvature: damping is divided.
def hessian_free():
    """Martens' settings, with his first damping."""
    return kc.HessianFree(damping=kc.LevenbergMarquardt.martens(initial=45 / 784), curvature_batch=0.25)


# Begins where it would soon be. Without the floor it falls for ever: on its own batch the model always foretells well.
FALLING = kc.LevenbergMarquardt(initial=1e-5, decay=0.95, low=0.25, high=0.75, every=5, minimum=1e-7)


def adaptive_kfac():
    """K-FAC that chooses its steps; products see a quarter of the batch."""
    return kc.KFAC.adaptive(damping=FALLING, factors_every=5, inverses_every=20, curvature_batch=0.25)


METHODS = {
    "SGD": Method(lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), kerass=True),
    "Adam": Method(lambda: keras.optimizers.Adam(0.001), kerass=True),
    "Muon": Method(lambda: keras.optimizers.Muon(0.001), kerass=True),
    "Adam, large batch": Method(
        lambda: keras.optimizers.Adam(0.001), kerass=True,
        batch={"autoencoder": 1000, "cifar10": 512, "characters": 128},
    ),
    "KFAC, adaptive": Method(adaptive_kfac, batch={"autoencoder": 500}, problems=("autoencoder",)),
    "SKFAC, adaptive": Method(
        lambda: kc.SKFAC.adaptive(damping=FALLING, curvature_batch=0.5), problems=("autoencoder",)
    ),
    "KFAC": Method(kc.KFAC),
    "EKFAC": Method(kc.EKFAC),
    "Eva": Method(kc.Eva),
    "FOOF": Method(kc.FOOF),
    "SINGD": Method(kc.SINGD),
    "SKFAC": Method(kc.SKFAC),
    "KBFGS": Method(kc.KBFGS),
    "MKOR": Method(kc.MKOR),
    "LocoProp": Method(kc.LocoProp),
    "TNT": Method(kc.TNT),
    "Muon, all matrices": Method(kc.Muon),
    "NewtonMuon": Method(kc.NewtonMuon),
    "Scion": Method(kc.Scion),
    "SPlus": Method(kc.SPlus),
    "SOAP": Method(kc.SOAP),
    "SOAP, KL": Method(lambda: kc.SOAP(factors="kl")),
    "SOAP, KL, sign": Method(lambda: kc.SOAP(factors="kl", sign=True)),
    "SOAP, one-sided": Method(lambda: kc.SOAP(sides="shortest")),
    "SOAP, tiles of 128": Method(lambda: kc.SOAP(block_size=128)),
    "Shampoo": Method(kc.Shampoo),
    "KLShampoo": Method(kc.KLShampoo),
    "KLShampoo, tiles": Method(lambda: kc.KLShampoo(block_size=128)),
    "PSGD": Method(kc.PSGD),
    "HessianFree": Method(hessian_free, batch={"autoencoder": 6000}, problems=("autoencoder",)),
    "CurveBall": Method(kc.CurveBall),
    "Neumann": Method(kc.Neumann),
    "AdaHessian": Method(kc.AdaHessian),
    "SASSHA": Method(kc.SASSHA),
    "SophiaG": Method(kc.SophiaG),
    "SophiaH": Method(kc.SophiaH),
    "ESGD": Method(kc.ESGD),
    "SquareRootFreeAdam": Method(kc.SquareRootFreeAdam),
    "DiagonalNewton": Method(kc.DiagonalNewton),
}


# One run.


class Runner:
    """Runs of one method, on one model and one traced graph.

    Args:
        setting: A `Setting`.
        method: A key of `METHODS`.
        size: The batch size.
        data: `((x, y), (x, y))` of training and validation.
        clock: What time it is, in seconds.
    """

    def __init__(self, setting, method, size, data, clock):
        self.setting, self.size, self.clock = setting, size, clock
        x, y = self.x, self.y = [tf.constant(a) for a in data[0]]
        self.x_new, self.y_new = [tf.constant(a[: setting.sample]) for a in data[1]]
        self.model, self.optimizer = setting.model(0), METHODS[method].make()
        own = isinstance(self.optimizer, kc.CurvatureOptimizer)
        self.model = kc.curved(self.model) if own else self.model
        self.model.compile(self.optimizer, loss=setting.loss(), jit_compile=False)
        self.optimizer.build(self.model.trainable_variables)
        # Keras creates the loss and its metric at the first call; here, because variables cannot be born in a loop
        self.model.compute_loss(x[:1], y[:1], self.model(x[:1]))
        self.model.make_train_function()
        self._fresh = [v.numpy() for v in self.optimizer.variables]
        self._step = tf.autograph.experimental.do_not_convert(self.model.train_step)  # as in Keras' train function
        self._steps = tf.function(self._several_steps, [tf.TensorSpec((None, size), "int32")])
        self._loss = tf.function(self._loss_of_sample)
        self._validation = tf.function(self._loss_and_accuracy)

    def begin(self, rate, seed):
        """Weights, statistics and state as at the very beginning."""
        for variable, value in zip(self.model.variables, self.setting.model(seed).get_weights()):
            variable.assign(value)
        for variable, value in zip(self.optimizer.variables, self._fresh):
            variable.assign(value)
        self.optimizer.learning_rate.assign(rate)

    def run(self, rate, seed, seconds, decays=True):
        """One run of so many seconds, a dictionary; looks after equal times.

        Args:
            rate: The learning rate at the beginning.
            seed: Of weights and batches.
            seconds: The budget.
            decays: Whether the rate falls linearly to zero.
        """
        self.begin(rate, seed)
        self._steps(tf.constant(np.stack([np.arange(self.size, dtype="int32")])))  # traced, and warm
        self.begin(rate, seed)
        stream, steps, spent, looks = batches(len(self.x), self.size, seed), 0, 0.0, [(0, 0.0, self._look())]
        start, last, each = looks[0][2], 0.0, None
        while spent < seconds and (math.isfinite(looks[-1][2]) and looks[-1][2] < 100 * start):
            due = max(self.setting.seconds / LOOKS - (spent - last), 0.0)
            count = 1 if each is None else max(1, min(50, int(due / each)))
            rows = tf.constant(np.stack([next(stream) for _ in range(count)]))
            if decays:
                self.optimizer.learning_rate.assign(rate * (1 - spent / seconds))
            begin = self.clock()
            self._steps(rows)
            each = (self.clock() - begin) / count
            steps, spent = steps + count, spent + each * count
            if spent - last >= 0.9 * self.setting.seconds / LOOKS or spent >= seconds:
                looks.append((steps, round(spent, 3), self._look()))
                last = spent
        return {
            "rate": rate, "seed": seed, "batch": self.size, "steps": steps, "seconds": spent, "looks": looks,
            "validation": [float(f"{float(number):.5g}") for number in self._validation()],
        }  # fmt: skip

    def _look(self):
        return float(f"{float(self._loss()):.5g}")

    def _several_steps(self, rows):
        """`fit` on the batches of `rows`, (steps, size), without leaving the graph in between."""
        for batch in rows:
            self._step((tf.gather(self.x, batch), tf.gather(self.y, batch)))

    def _loss_of_sample(self):
        # on a curved model Neumann's weights are its answer; with statistics of the sample, since the moving averages
        # of batch normalization take longer to settle than a step
        count = self.setting.sample
        return self.setting.loss()(self.y[:count], self.model(self.x[:count], training=True))

    def _loss_and_accuracy(self):
        """Of new examples, in inference mode; no accuracy where there are no classes."""
        outputs = self.model(self.x_new, training=False)
        found = [self.setting.loss()(self.y_new, outputs)]
        if self.setting.classes:
            found.append(tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(self.y_new, outputs)))
        return found


# All runs.


class Runs:
    """The finished runs, one line of a file each."""

    def __init__(self, path):
        self.path, self.runs = path, lines_of(path)

    def append(self, entry):
        """One more line, on the disk when this returns."""
        self.runs.append(entry)
        add_line(self.path, entry)

    def of(self, method, kind):
        """The runs of a method: "rates", "seeds" or "unconfigured"."""
        return [run for run in self.runs if run["method"] == method and run["kind"] == kind]

    def best(self, method):
        """The runs of a method over the whole budget at the rate that is best on the first seed."""
        whole = self.of(method, "seeds")
        first = {run["rate"]: score(run) for run in whole if run["seed"] == SEEDS[0]}
        return [run for run in whole if run["rate"] == min(first, key=first.get)]

    def settings(self):
        """What all runs must share."""
        return self.runs[0]["settings"] if self.runs else None


def score(run):
    """The loss at the end; infinite where it diverged."""
    loss = run["looks"][-1][2]
    return loss if math.isfinite(loss) and loss < run["looks"][0][2] else math.inf


def next_rate(found, default):
    """The rate to try next, or `None` where the best has both neighbours; `found` is `{rate: score}`."""
    if not found:
        return min(RATES, key=lambda rate: abs(math.log(rate / default)))
    if all(math.isinf(value) for value in found.values()):  # every rate so far was too high
        lower = [rate for rate in RATES if rate < min(found)]
        return lower[-1] if lower else None
    best = RATES.index(min(found, key=found.get))
    around = [RATES[i] for i in (best - 1, best + 1) if 0 <= i < len(RATES)]
    return next((rate for rate in around if rate not in found), None)


def train(runs, problem, methods, data, clock, settings, seconds):
    """All runs that are not there yet."""
    setting = dataclasses.replace(PROBLEMS[problem], seconds=seconds)
    for name in (name for name in methods if problem in METHODS[name].problems):
        train_method(runs, name, setting, METHODS[name].batch.get(problem, setting.batch), data, clock, settings)
        keras.backend.clear_session()


def train_method(runs, name, setting, size, data, clock, settings):
    """The runs of one method that are not there yet."""
    runner, default = None, float(METHODS[name].make().learning_rate)

    def run(rate, seed, seconds, kind):
        nonlocal runner
        runner = runner or Runner(setting, name, size, data, clock)
        found = runner.run(rate, seed, seconds, decays=kind != "unconfigured")
        runs.append({"method": name, "kind": kind, "settings": settings, **found})
        end = f"{found['steps']:>5} steps  {found['looks'][-1][2]:.5g}"
        print(f"{name:<20} {kind} {rate:<8g} seed {seed}  {end}", flush=True)

    def search(kind, start, seconds):
        while True:
            tried = {r["rate"]: score(r) for r in runs.of(name, kind) if r["seed"] == SEEDS[0]}
            rate = next_rate(tried, start)
            if rate is None:
                return min(tried, key=tried.get)
            run(rate, SEEDS[0], seconds, kind)

    best = search("seeds", search("rates", default, SCREENING * setting.seconds), setting.seconds)
    for seed in SEEDS:
        if not any(r["seed"] == seed for r in runs.best(name)):
            run(best, seed, setting.seconds, "seeds")
    if not runs.of(name, "unconfigured"):
        run(default, SEEDS[0], setting.seconds, "unconfigured")


# The table and the figure.


def reached(run, target):
    """`(steps, seconds)` of the first look at which the loss is at the target; infinite where none is."""
    return next(((s, t) for s, t, loss in run["looks"] if loss <= target), (math.inf, math.inf))


def target(runs):
    """`(the best of Keras' own optimizers, its loss at the end)`."""
    ends = {
        name: statistics.median(score(run) for run in runs.best(name))
        for name, method in METHODS.items() if method.kerass and runs.best(name)
    }  # fmt: skip
    best = min(ends, key=ends.get)
    return best, ends[best]


def number(value, form):
    return "-" if math.isinf(value) else format(value, form)


def report(runs, problem):
    """The lines of the table."""
    best, goal = target(runs)
    head = f"{'':<20} {'batch':>6} {'rate':>8} {'ms/step':>8} {'steps':>6} {'training loss':>22} {'validation':>10}"
    lines = [
        f"== {PROBLEMS[problem].title}", "", runs.settings(), f"target: {goal:.5g}, of {best} at the end", "",
        f"{head} {'accuracy':>8} {'unconfigured':>12}   | {'steps':>6} {'seconds':>8} {'of ' + best:>9}",
    ]  # fmt: skip
    own = statistics.median(reached(run, goal)[1] for run in runs.best(best))
    for name in METHODS:
        found, plain = runs.best(name), runs.of(name, "unconfigured")
        if len(found) < len(SEEDS) or not plain:
            continue
        rate, ends = found[0]["rate"], sorted(score(run) for run in found)
        edge = "*" if rate in (RATES[0], RATES[-1]) else ""
        pace = 1e3 * statistics.median(run["seconds"] / run["steps"] for run in found)
        line = f"{name:<20} {found[0]['batch']:>6} {rate:>7g}{edge or ' '} {pace:>8.1f} {found[0]['steps']:>6}"
        line += f" {'/'.join(number(end, '.4g') for end in ends):>22}"
        loss, *accuracy = (statistics.median(values) for values in zip(*(run["validation"] for run in found)))
        unconfigured = number(score(plain[0]), ".4g")
        line += f" {loss:>10.4g} {format(accuracy[0], '.1%') if accuracy else '':>8} {unconfigured:>12}"
        steps, seconds = (statistics.median(reached(run, goal)[i] for run in found) for i in (0, 1))
        line += f"   | {number(steps, '.0f'):>6} {number(seconds, '.1f'):>8} {number(seconds / own, '.2f'):>9}"
        lines.append(line)
    return [
        *lines, "", "training loss: of three seeds, sorted; validation: medians; *: at the edge of the grid;",
        "-: not reached within the budget, or diverged",
    ]  # fmt: skip


def draw(runs, problem, path):
    """Loss against steps and against seconds, one line per method, the median seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    _, goal = target(runs)
    names = [name for name in METHODS if len(runs.best(name)) == len(SEEDS)]
    ours = [name for name in names if not METHODS[name].kerass]
    colors = dict(zip(ours, plt.get_cmap("tab20").colors))
    colors |= dict(zip([name for name in names if name not in ours], ("black", "dimgray", "darkgray", "lightgray")))
    for name in names:
        run = sorted(runs.best(name), key=score)[len(SEEDS) // 2]
        for axis, column in zip(axes, (0, 1)):
            style = {"color": colors[name], "linewidth": 2.2 if METHODS[name].kerass else 1.4}
            style["linestyle"] = "--" if METHODS[name].kerass else "-"
            points = run["looks"][1:]
            axis.plot([p[column] for p in points], [p[2] for p in points], label=name, **style)
    lowest = min(score(run) for name in names for run in runs.best(name))
    highest = max(run["looks"][0][2] for name in names for run in runs.best(name))
    for axis, label in zip(axes, ("steps", "seconds")):
        axis.axhline(goal, color="black", linewidth=0.7, linestyle=":")
        axis.set(xlabel=label, yscale="log", ylim=(0.95 * lowest, 1.1 * highest))
        axis.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="training loss", xscale="log")
    axes[0].set_title(PROBLEMS[problem].title, fontsize=10)
    axes[1].legend(fontsize=8, ncol=1, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes[1].set_title("dotted: the best of Keras' own at the end (dashed lines)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Training loss against steps and seconds.")
    parser.add_argument("problem", choices=list(PROBLEMS))
    parser.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seconds", type=float, help="budget of a run; by default the problem's own")
    parser.add_argument("--threads", type=int, choices=[1], help="one thread, and the processor's seconds")
    parser.add_argument("--only_draw", action="store_true")
    parser.add_argument("--out", default="time_to_target", help="the files' beginning")
    parser.add_argument("--figure", help="the figure's path")
    args = parser.parse_args()
    clock, how = time.perf_counter, f"{os.cpu_count()} cores"
    if args.threads:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        clock, how = time.process_time, "one thread, seconds of the processor"
    out, seconds = f"{args.out}_{args.problem}", args.seconds or PROBLEMS[args.problem].seconds
    runs = Runs(out + ".jsonl")
    if any("validation" not in run for run in runs.runs):
        raise SystemExit(f"{runs.path} is of an earlier version, whose rates did not fall. Pass another --out.")
    if not args.only_draw:
        versions = f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}"
        versions += f", keras_curvature {kc.__version__}"
        settings = f"{versions}; {how} ({platform.machine()}), {seconds:g} seconds each, {SCREENING:g} of that per rate"
        if runs.settings() not in (None, settings):
            raise SystemExit(f"{runs.path} has runs with other settings: {runs.settings()}. Pass another --out.")
        try:
            data = PROBLEMS[args.problem].data(args.data_dir)
        except (ValueError, FileNotFoundError, ImportError) as error:
            parser.error(f"--data_dir: {error}")
        train(runs, args.problem, args.methods, data, clock, settings, seconds)
    if not runs.runs:
        raise SystemExit(f"There are no runs in {runs.path}. Leave out --only_draw, or pass the --out that has them.")
    text = "\n".join(report(runs, args.problem)) + "\n"
    print(text)
    with open(out + ".txt", "w") as file:
        file.write(text)
    draw(runs, args.problem, args.figure or out + ".png")


if __name__ == "__main__":
    main()
