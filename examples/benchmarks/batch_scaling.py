"""Steps and examples to a target loss against the size of the batch, 64 to 8192:

    pip install ".[examples]"
    python examples/benchmarks/batch_scaling.py --data_dir ~/tensorflow_datasets

For SGD with Nesterov momentum, Adam, Neumann and CurveBall, on MNIST and CIFAR-10; about three quarters of an hour on
two free cores. Every finished run is a line of `batch_scaling.jsonl`. After an interruption the same command goes on
with the run that was stopped. At the end it writes a table, `batch_scaling.txt`, and a figure, `batch_scaling.png`.
To draw those of this repository again, without training:

    python examples/benchmarks/batch_scaling.py --only_draw --out examples/benchmarks/results/batch_scaling \\
        --figure examples/images/batch_scaling.png

How it measures:

* A run trains one network from one seed, at one batch size and one constant learning rate, until the loss of a fixed
  sample of the training images is below the target, and counts steps. The loss is checked after every step at
  first, later whenever the number of steps has grown by 4%, which is the resolution.
* Every method has the same grid of learning rates and the same budget of examples and steps. All other settings are
  defaults, for `Neumann` with a warm-up of WARMUP = 10 steps, the default, at all batch sizes. The five epochs of SGD
  with which the paper warms up are longer than most runs here. The repulsion is the paper's.
* A batch above SLICE examples is taken in slices of that size, by `curved(model, micro_batches=...)`, for all methods.
* Runs that cannot be the best of their method and batch size are stopped, by one rule: see `verdict`.
* The best rate is found with seed 0 and repeated with two more; the table has the median of the three.

The networks have no dropout and no batch normalization. The moving averages of batch normalization settle more slowly
than a whole run with large batches takes, so a loss in inference mode would lag behind. And in slices, batch
normalization would use the statistics of the slices.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_curvature as kc

tf.get_logger().setLevel("ERROR")  # a graph for every method and batch size, which TensorFlow takes for a mistake

SIZES = tuple(2**k for k in range(6, 14))
RATES = tuple(float(f"{10 ** (k / 3):.2g}") for k in range(-12, 5))  # 0.0001 to 22, three to a decade
SLICE = 1024
SAMPLE = 2048  # training images whose loss is looked at
GROWTH = 1.04  # of the number of steps between two looks
WARMUP = 10
REPEATS = (1, 2)  # seeds that repeat the best rate

# name: (optimizer, the rate that is tried first at the smallest batch size: its default)
METHODS = {
    "SGD": (lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), 0.01),
    "Adam": (lambda: keras.optimizers.Adam(0.001), 0.001),
    "Neumann": (lambda: kc.Neumann(0.05, warmup_steps=WARMUP), 0.05),
    "CurveBall": (lambda: kc.CurveBall(1.0), 1.0),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its data and what is asked of it."""

    title: str
    model: Callable  # of a seed
    data: Callable  # of a folder; ((x, y), ...)
    target: float
    epochs: float  # the budget of a run
    steps: int = 4000  # and not more than that


def small_cnn():
    """Two strided convolutions 5x5 and a dense layer, 26000 weights: (batch, 32, 32, 3) in [0, 1] -> (batch, 10)."""
    return keras.Sequential([
        keras.Input((32, 32, 3)),
        layers.Rescaling(4.0, offset=-2.0),  # about zero mean and unit variance
        layers.Conv2D(16, 5, strides=2, padding="same", activation="relu"),  # (batch, 16, 16, 16)
        layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),  # (batch, 8, 8, 32)
        layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),  # (batch, 4, 4, 32)
        layers.Flatten(),
        layers.Dense(10),
    ])  # fmt: skip


_mnist = kc.problems.get("mnist_mlp")
PROBLEMS = {
    "mnist": Setting("MNIST, 784-128-64-10 network", _mnist.model, _mnist.data, target=0.1, epochs=30),
    "cifar10": Setting(
        "CIFAR-10, small convolutional network", kc.problems.seeded(small_cnn),
        lambda folder: kc.problems.data("cifar10", folder), target=1.4, epochs=30,
    ),
}  # fmt: skip


# One run.


def looks(last):
    """The numbers of steps after which the loss is looked at: 1, 2, 3, ..., then growing by 4%, up to `last`."""
    step = 0
    while step < last:
        step = min(max(step + 1, math.ceil(GROWTH * step)), last)
        yield step


def batches(examples, size, seed):
    """Rows (size,) without end: shuffled epoch after epoch, cut without regard to where one ends."""
    random, rest = np.random.RandomState(seed), np.empty(0, "int32")
    while True:
        while len(rest) < size:
            rest = np.concatenate([rest, random.permutation(examples).astype("int32")])
        yield rest[:size]
        rest = rest[size:]


def verdict(step, loss, start, target, best):
    """Why a run ends here, or None.

    "reached": the loss is below the target. "diverged": it is not finite, or a hundred times that of the start.
    "slower": the run has taken as many steps as `best`, the best run so far of its method, batch size and seed; or at
    least half as many, and its loss is above that of `best` after half as many steps as it has taken itself.
    """
    if loss < target:
        return "reached"
    if not math.isfinite(loss) or loss > 100 * start:
        return "diverged"
    if best is None or 2 * step < best["steps"]:
        return None
    earlier = [passed for s, passed in zip(looks(best["steps"]), best["losses"]) if 2 * s <= step]
    return "slower" if step >= best["steps"] or (earlier and loss > earlier[-1]) else None


class Runner:
    """Runs of one method at one batch size, on one model and one traced graph.

    Args:
        setting: A `Setting`.
        method: A key of `METHODS`.
        size: The batch size.
        x, y: The training images and labels.
    """

    def __init__(self, setting, method, size, x, y):
        self.setting, self.size, self.x, self.y = setting, size, tf.constant(x), tf.constant(y)
        slices = {"micro_batches": size // SLICE} if size > SLICE else {}
        self.model = kc.curved(setting.model(0), **slices)
        self.model.compile(METHODS[method][0](), loss=loss_of_logits(), jit_compile=False)
        self.optimizer = self.model.optimizer
        self.optimizer.build(self.model.trainable_variables)
        # Keras creates the loss and its metric at the first call; here, because variables cannot be born in a loop
        self.model.compute_loss(self.x[:1], self.y[:1], self.model(self.x[:1]))
        self.model.make_train_function()
        self._fresh = [v.numpy() for v in self.optimizer.variables]
        self._step = tf.autograph.experimental.do_not_convert(self.model.train_step)  # as in Keras' train function
        rows = tf.TensorSpec((None, size), "int32")
        self._steps, self._loss = tf.function(self._several_steps, [rows]), tf.function(self._loss_of_sample)

    def run(self, rate, seed, best=None):
        """One run, a dictionary; `best` is the run that it must not be slower than."""
        setting = self.setting
        self.model.set_weights(setting.model(seed).get_weights())
        for variable, value in zip(self.optimizer.variables, self._fresh):
            variable.assign(value)
        self.optimizer.learning_rate.assign(rate)
        last = min(setting.steps, int(setting.epochs * len(self.x)) // self.size)
        stream, done, losses, seconds = batches(len(self.x), self.size, seed), 0, [], []
        start, begun = float(self._loss()), time.perf_counter()
        for step in looks(last):
            rows = tf.constant(np.stack([next(stream) for _ in range(step - done)]))
            begin = time.perf_counter()
            self._steps(rows)
            seconds.append((time.perf_counter() - begin) / (step - done))
            losses.append(float(f"{float(self._loss()):.4g}"))
            done, end = step, verdict(step, losses[-1], start, setting.target, best)
            if end:
                break
        found = {"rate": rate, "seed": seed, "end": end or "budget", "steps": done, "loss": losses[-1]}
        found["milliseconds"] = float(f"{1e3 * statistics.median(seconds):.3g}")
        found["seconds"] = round(time.perf_counter() - begun, 1)
        return {**found, "losses": losses} if end == "reached" else found

    def _several_steps(self, rows):
        """`fit` on the batches of `rows`, (steps, size), without leaving the graph in between."""
        for batch in rows:
            self._step((tf.gather(self.x, batch), tf.gather(self.y, batch)))

    def _loss_of_sample(self):
        # On a curved model Neumann's weights are its answer. SGD's are the look-ahead weights, as Keras keeps them.
        return loss_of_logits()(self.y[:SAMPLE], self.model(self.x[:SAMPLE], training=False))


def loss_of_logits():
    """The cross-entropy that all runs minimize."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# All runs.


def lines_of(path):
    """The entries of a file of one each line; nothing where there is none, and a line cut off by a kill is removed."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as file:
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # killed while writing
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]


def add_line(path, entry):
    """One more entry, on the disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Runs:
    """The finished runs, one line of a file each, and one line for the settings of each problem."""

    def __init__(self, path):
        self.path, self.settings, self.versions, self.runs = path, {}, {}, []
        for entry in lines_of(path):
            self._take(entry)

    def _take(self, entry):
        if "settings" in entry:
            self.settings[entry["problem"]], self.versions[entry["problem"]] = entry["settings"], entry["versions"]
        else:
            self.runs.append(entry)

    def append(self, entry):
        """One more line, on the disk when this returns."""
        self._take(entry)
        add_line(self.path, entry)

    def begin(self, problem, settings):
        """Note the settings of a problem; runs with other settings are not comparable, and refused."""
        known = self.settings.get(problem)
        if known is None:
            self.append({"problem": problem, "settings": settings, "versions": versions()})
            return
        other = [f"{k}: {known.get(k)} there, {v} now" for k, v in settings.items() if known.get(k) != v]
        if other:
            raise SystemExit(f"{self.path} has runs of {problem} with other settings ({other[0]}). Pass another --out.")

    def of(self, problem, method, size, seed=None):
        """The runs of a cell of the table, of one seed or of all."""
        wanted = {"problem": problem, "method": method, "size": size, **({} if seed is None else {"seed": seed})}
        return [run for run in self.runs if all(run[k] == v for k, v in wanted.items())]

    def best(self, problem, method, size):
        """The run of the grid that needed the fewest steps, or None; of two alike the one with the lower loss."""
        reached = [run for run in self.of(problem, method, size, seed=0) if run["end"] == "reached"]
        return min(reached, key=lambda run: (run["steps"], run["loss"]), default=None)


def settings_of(problem, epochs):
    """What must be equal for runs to be comparable, as JSON gives it back."""
    setting = PROBLEMS[problem]
    return {
        "target": setting.target, "epochs": epochs or setting.epochs, "steps": setting.steps, "rates": list(RATES),
        "slice": SLICE, "sample": SAMPLE, "growth": GROWTH, "warmup": WARMUP,
    }  # fmt: skip


def versions():
    """What the runs ran on."""
    packages = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_curvature {kc.__version__}"
    return f"{packages}; {os.cpu_count()} cores ({platform.machine()}), graph mode"


def order(rates, first):
    """The rates from the nearest to `first` outwards: the sooner a good one is known, the sooner bad ones stop."""
    return sorted(rates, key=lambda rate: abs(math.log(rate / first)))


def train(runs, problem, epochs, data, say):
    """All runs of a problem that are not there yet."""
    setting = dataclasses.replace(PROBLEMS[problem], epochs=epochs or PROBLEMS[problem].epochs)
    for size in SIZES:
        for method, (_, default) in METHODS.items():
            below = [b for b in (runs.best(problem, method, s) for s in SIZES if s < size) if b]
            first = below[-1]["rate"] if below else default
            cell, runner = {"problem": problem, "method": method, "size": size}, None
            plan = [(rate, 0) for rate in order(RATES, first)] + [(None, seed) for seed in REPEATS]
            for rate, seed in plan:
                best = runs.best(**cell)
                rate = rate or (best and best["rate"])
                if rate is None or any(run["rate"] == rate for run in runs.of(**cell, seed=seed)):
                    continue  # nothing to repeat, or done already
                runner = runner or Runner(setting, method, size, *data)
                runs.append({**cell, **runner.run(rate, seed, best if seed == 0 else None)})
                say(runs.runs[-1])


# The table and the figure.


def row(runs, problem, method, size):
    """What the table says of a method at a batch size, a dictionary; None where nothing has been run yet."""
    cell = {"problem": problem, "method": method, "size": size}
    grid, best = runs.of(**cell, seed=0), runs.best(**cell)
    if not grid:
        return None
    # of the fastest run, the one that other work of the machine disturbed least
    found = {"milliseconds": min(run["milliseconds"] for run in grid), "missing": len(RATES) - len(grid)}
    if best is None:
        found["loss"] = min(run["loss"] for run in grid if not math.isnan(run["loss"]))
        return {**found, "steps": None, "tried": max(run["steps"] for run in grid)}
    repeats = [run for seed in REPEATS for run in runs.of(**cell, seed=seed) if run["rate"] == best["rate"]]
    counts = sorted(run["steps"] if run["end"] == "reached" else math.inf for run in [best, *repeats])
    edge = {RATES[0]: "lowest rate", RATES[-1]: "highest rate"}.get(best["rate"], "")
    steps = counts[len(counts) // 2]
    return {**found, "rate": best["rate"], "edge": edge, "steps": steps, "counts": counts, "examples": steps * size}


def table(runs, problem):
    """The lines of a problem's table."""
    epochs, target = (runs.settings[problem][key] for key in ("epochs", "target"))
    yield f"\n{PROBLEMS[problem].title}: steps until the training loss is below {target}, within {epochs:g} epochs\n"
    head = f"{'batch':>5}  {'method':<10} {'rate':>8} {'steps':>6} {'of the seeds':>16}"
    yield f"{head} {'examples':>9} {'ideal':>6} {'time':>5}"
    for size in SIZES:
        rows = {method: row(runs, problem, method, size) for method in METHODS}
        for method, r in rows.items():
            if r is not None:
                yield _line(size, method, r, row(runs, problem, method, SIZES[0]), rows["SGD"])
        yield ""


def _line(size, method, r, smallest, sgd):
    time = f"{r['milliseconds'] / sgd['milliseconds']:>5.1f}" if sgd else f"{'':>5}"
    notes = [f"{r['missing']} rates to come"] if r["missing"] else []
    if r["steps"] is None:
        notes = [f"not reached in {r['tried']} steps; the lowest loss at the end of a run was {r['loss']:.3g}", *notes]
        return f"{size:>5}  {method:<10} {', '.join(notes)}"
    notes = [r["edge"]] * bool(r["edge"]) + notes
    counts = ", ".join("not" if math.isinf(c) else str(c) for c in r["counts"])
    # the share of perfect scaling: as many examples as with the smallest batch would be all of it
    share = smallest["examples"] / r["examples"] if smallest and smallest["steps"] else math.nan
    cells = f"{r['rate']:>8.2g} {r['steps']:>6} {counts:>16} {r['examples']:>9} {share:>6.0%} {time}"
    return f"{size:>5}  {method:<10} {cells}  {', '.join(notes)}".rstrip()


def report(runs, problems):
    """The lines of the results."""
    settings = next(iter(runs.settings.values()))
    yield "Steps and examples to a target loss against the size of the batch; how, says batch_scaling.py."
    yield from dict.fromkeys(runs.versions.values())
    yield (
        f"rates {', '.join(f'{rate:g}' for rate in RATES)}; constant. Everything else by default, but "
        f"Neumann(warmup_steps={settings['warmup']})."
    )
    yield "rate: the best of the grid, by seed 0. steps: the median of three seeds, which stand beside it."
    yield "ideal: the share of perfect scaling from the smallest batch, where examples would stay the same."
    yield "time: of a step of the fastest run, with SGD's at the same batch size as 1; the machine had other work too."
    for problem in problems:
        if problem in runs.settings:
            yield from table(runs, problem)
    ends = [run["end"] for run in runs.runs]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in ("reached", "slower", "diverged", "budget"))
    minutes = sum(run["seconds"] for run in runs.runs) / 60
    yield f"{len(ends)} runs ({counts}), {minutes:.0f} minutes of steps and looks, without tracing."


def draw(runs, problems, path):
    """Steps against batch size, a panel for each problem."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(problems), figsize=(5.6 * len(problems), 5), layout="constrained", squeeze=False)
    for axis, problem in zip(axes[0], problems):
        _panel(axis, runs, problem)
    axes[0][0].set_ylabel("steps to the target, at the best learning rate")
    figure.savefig(path, dpi=120)
    plt.close(figure)


COLORS = {"SGD": "#e8710a", "Adam": "#7f7f7f", "Neumann": "#1f77b4", "CurveBall": "#2ca02c"}


def _panel(axis, runs, problem):
    """Lines of the medians, bars over the seeds, triangles at the budget where the target was not reached."""
    labels, first, everything = [], [], []
    for place, (method, color) in enumerate(COLORS.items()):
        rows = {size: row(runs, problem, method, size) for size in SIZES}
        points = {size: _point(r) for size, r in rows.items() if r}
        everything += points.values()
        beside = 1.04 ** (place - 1.5)  # so that bars do not hide one another
        reached = {size * beside: point for size, point in points.items() if point[2]}
        axis.plot(list(reached), [steps for steps, _, _ in reached.values()], "o-", ms=4, lw=1.8, color=color)
        for x, (_, span, _) in reached.items():
            axis.vlines(x, *span, color=color, lw=1.2, alpha=0.7)
        missed = {size * beside: steps for size, (steps, _, hit) in points.items() if not hit}
        axis.plot(list(missed), list(missed.values()), "^", ms=7, mfc="none", color=color)
        first += [steps for size, (steps, _, hit) in points.items() if size == SIZES[0] and hit]
        labels += [(max(points), points[max(points)][0], method)] if points else []
    if first:
        low = 0.6 * axis.dataLim.y0  # the line ends there: it would go down to a handful of steps
        last = min(first) * SIZES[0] / low
        axis.plot([SIZES[0], last], [min(first), low], ls=(0, (4, 3)), lw=1.2, color="black", alpha=0.6)
        axis.annotate("perfect scaling ", (last, low), alpha=0.8, va="bottom", ha="right")
    for size in {size for size, _, _ in labels}:
        here = [(steps, method) for s, steps, method in labels if s == size]
        for (_, method), height in zip(here, _apart([math.log(steps) for steps, _ in here])):
            axis.annotate(method, (size * 1.18, math.exp(height)), color=COLORS[method], va="center")
    if not all(hit for _, _, hit in everything):
        axis.plot([], [], "^", ms=7, mfc="none", color="black", label="not reached within the budget")
        axis.legend(frameon=False, loc="upper right")
    _axes(axis, f"{PROBLEMS[problem].title}\nto a training loss of {runs.settings[problem]['target']:g}")


def _point(r):
    """`(steps, (least, most of the seeds), whether the target was reached)` of a row."""
    if r["steps"] is None or math.isinf(r["steps"]):
        return r.get("tried") or r["counts"][0], None, False
    return r["steps"], (r["counts"][0], max(c for c in r["counts"] if math.isfinite(c))), True


def _axes(axis, title):
    axis.set(xscale="log", yscale="log", xlabel="batch size", xlim=(SIZES[0] * 0.8, SIZES[-1] * 4.2))
    axis.set_title(title, fontsize=10.5)
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    low, high = axis.get_ylim()
    ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _apart(heights, gap=0.25):
    """The heights, moved until no two are nearer than `gap`, in the order given."""
    ranked = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, above in zip(ranked, ranked[1:]):
        moved[above] = max(moved[above], moved[below] + gap)
    shift = (sum(moved) - sum(heights)) / max(1, len(heights))
    return [height - shift for height in moved]


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Steps to a target loss against the size of the batch.")
    parser.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
    parser.add_argument("--problem", choices=["all", *PROBLEMS], default="all")
    parser.add_argument("--budget", type=float, help="most epochs of a run; by default those of the problem")
    parser.add_argument("--out", default="batch_scaling", help="path of runs, table and figure, without the ending")
    parser.add_argument("--figure", help="path of the figure, where it is another")
    parser.add_argument("--only_draw", action="store_true", help="table and figure of the runs that are there")
    args = parser.parse_args(arguments)
    if args.budget is not None and not args.budget > 0:
        parser.error(f"--budget must be positive. Received: --budget {args.budget:g}")
    chosen, runs = list(PROBLEMS) if args.problem == "all" else [args.problem], Runs(args.out + ".jsonl")
    if not args.only_draw:
        try:
            data = {problem: PROBLEMS[problem].data(args.data_dir)[0] for problem in chosen}
        except (ValueError, FileNotFoundError, ImportError) as error:
            parser.error(f"--data_dir: {error}")
        for problem in chosen:
            runs.begin(problem, settings_of(problem, args.budget))
            train(runs, problem, args.budget, [tf.constant(a) for a in data.pop(problem)], show)
    if not runs.runs:
        raise SystemExit(f"There are no runs in {runs.path}. Leave out --only_draw, or pass the --out that has them.")
    problems = [problem for problem in PROBLEMS if problem in runs.settings]
    text = "\n".join(report(runs, problems)) + "\n"
    print(text)
    with open(args.out + ".txt", "w") as file:
        file.write(text)
    draw(runs, problems, args.figure or args.out + ".png")


def show(run):
    """One line of progress."""
    print(
        f"{run['problem']:<8} {run['method']:<10} batch {run['size']:>4}  rate {run['rate']:<7g} seed {run['seed']}  "
        f"{run['end']:<8} after {run['steps']:>4} steps, loss {run['loss']:<8.4g} {run['seconds']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
