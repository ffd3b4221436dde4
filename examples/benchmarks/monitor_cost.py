"""What measuring curvature costs: questions to a model, training with the board, the report.

    pip install ".[examples]" torch pyhessian curvlinops-for-pytorch
    cd examples/benchmarks
    python monitor_cost.py --data_dir ~/tensorflow_datasets --out results/monitor_cost.txt

Prints three tables, in about six minutes on two free cores. Without torch, PyHessian and curvlinops it prints only the
rows of this package and says what to install. Without `--data_dir` it uses generated images. How it measures:

* Questions: the same network, weights and examples for all three packages, copied from Keras to torch; the losses
  must agree to 1e-5 before anything is measured. A product is one of the Hessian with a vector, over all examples.
  `set up` is the work before the questions: tracing, the first backward pass, one product. `off by` is the relative
  difference from the converged value: SciPy's `eigsh` on curvlinops in float64; for the trace the exact value, from
  gradients of single examples; or, where torch is not installed, this package with many products.
* Sharpness, to 1e-3. This package and PyHessian's power iteration take a number of steps: `fewest` is the smallest
  number that is accurate enough, by bisection. SciPy's `eigsh`, which curvlinops' documentation uses, and PyHessian as
  it is commonly called, stop by their own rules at `tol=1e-3`. A warm start is the eigenvector from ten training steps
  earlier; PyHessian has no warm start.
* Trace, to a standard error of 5 %, which this package estimates: after ten products Hutchinson's estimate predicts
  how many are needed, also where the largest eigenvalues are found first (`deflated`); XTrace doubles its products
  until it is accurate enough. All products count. PyHessian stops by its own rule at `tol=0.05`, which is not an
  error bar; curvlinops has no rule and gets as many products as this package took. `off by` is the root mean square
  over four seeds.
* Board: two models in `fit`, one with the board and one without, take turns of one second, each on its own clock.
  `adds` is the additional time per step, without one-time work (`once`: tracing and the first spectrum, as counted by
  the board). `own` is the share that the board has counted. Between runs of this program `adds` has moved by up to
  three percentage points.
* Report: the times that it counts for its parts, on the first call for a model: tracing and files are included.

Products of the two packages are counted where they are made: in PyHessian by the `model.zero_grad` of each, in
curvlinops by its operator's products. The targets are this project's own.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from measuring import least, off, root_mean_square, timed  # which stands beside this file
from step_cost import PROBLEMS as BATCHES
from step_cost import printing

import keras_curvature as kc
from keras_curvature.monitor.spectra import traces

tf.get_logger().setLevel("ERROR")

PEERS = {"torch": "torch", "PyHessian": "pyhessian", "curvlinops-for-pytorch": "curvlinops"}  # to install: to import
SHARPNESS, TRACE = 1e-3, 0.05  # relative errors asked
COLD, WARM = 10, 5  # products, the targets
BUDGET = 0.05  # of the board
TURN = 1.0  # seconds
REPORT = 15  # seconds, the target
TOP = 10  # eigenvalues
STEPS = 100  # of a density
MOST = 100  # steps of a search; of power iteration PyHessian's default
EARLIER = 10  # training steps between the weights of a warm start and those of the question
SEEDS = (0, 1, 2, 3)


# The networks, at some points of their training.


def digits_mlp():
    """(batch, 64) -> (batch, 10)."""
    return keras.Sequential([keras.Input((64,)), layers.Dense(64, "relu"), layers.Dense(32, "relu"), layers.Dense(10)])


def mnist_cnn():
    """Two convolutions and two dense layers, 38282 weights: (batch, 28, 28, 1) -> (batch, 10)."""
    return keras.Sequential([
        keras.Input((28, 28, 1)),
        layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(3),  # (batch, 9, 9, 16)
        layers.Conv2D(32, 3, padding="same", activation="relu"), layers.MaxPooling2D(2),  # (batch, 4, 4, 32)
        layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(10),
    ])  # fmt: skip


def mnist(folder):
    """Training data of MNIST, or images of that shape."""
    return kc.problems.data("mnist", folder)[0] if folder else kc.problems.synthetic("images", 8192)


@dataclasses.dataclass
class Subject:
    """A trained network, the examples it is asked about, and its weights at some steps of training."""

    model: keras.Model
    x: np.ndarray
    y: np.ndarray
    weights: dict  # step: list of arrays

    def at(self, step):
        """The model with the weights that it had."""
        self.model.set_weights(self.weights[step])
        return self.model

    def first(self, examples):
        """The same, asked about so many of the examples."""
        return dataclasses.replace(self, x=self.x[:examples], y=self.y[:examples])

    def save(self, path):
        """What `torch_peers.py` reads."""
        weights = {f"{step}/{i}": w for step, arrays in self.weights.items() for i, w in enumerate(arrays)}
        layers = json.dumps([what_is(layer) for layer in self.model.layers])
        np.savez(path, x=self.x, y=self.y, layers=layers, **weights)


def what_is(layer):
    """`[class, its activation or size]`."""
    kind = type(layer).__name__
    if kind == "MaxPooling2D":
        return [kind, layer.pool_size[0]]
    return [kind, layer.activation.__name__ if hasattr(layer, "activation") else None]


def subject(model, data, points, examples=1024):
    """Trains with heavy ball; the weights are kept at the steps `points` and `EARLIER` before each."""
    x, y = data
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=False)
    random, weights = np.random.default_rng(0), {}
    for step in range(1, max(points) + 1):
        rows = random.integers(0, len(x), 64)
        model.train_on_batch(x[rows], y[rows])
        if step in points or step + EARLIER in points:
            weights[step] = model.get_weights()
    return Subject(model, x[:examples], y[:examples], weights)


# Questions.


def references(curvature):
    """Converged values by this package, for where the others are not installed."""
    top = curvature.top(TOP, tolerance=1e-5).values
    return {"top": list(top), "trace": traces.xtrace(curvature, curvature.objective.weights, 200).value}


def fewest(curvature, reference, start):
    """Products to a sharpness within `SHARPNESS` of the converged one."""

    def near(steps):
        return off(curvature.sharpness(start, steps).values[0], reference) <= SHARPNESS

    return least(near, MOST) or MOST


def fewest_in_training(curvature, of, points, starts=3):
    """`(cold, warm)`: products at each point of training, cold from several random vectors, both in order of size."""
    cold, warm = [], []
    for point in points:
        of.at(point - EARLIER)
        earlier = curvature.sharpness(steps=COLD).vectors[0]
        of.at(point)
        converged = curvature.top(1, tolerance=1e-4).values[0]
        cold += [fewest(curvature, converged, random_vector(curvature, seed)) for seed in range(starts)]
        warm.append(fewest(curvature, converged, earlier))
    return sorted(cold), sorted(warm)


def random_vector(curvature, seed):
    """Gaussian, of the shape of the weights."""
    random = np.random.default_rng(seed)
    return [tf.constant(random.standard_normal(w.shape), w.dtype) for w in curvature.objective.weights]


def questions(curvature, of, point, reference, set_up):
    """The rows of this package, as `torch_peers.py` has them."""
    rows = []

    def add(question, who, asked, error=None):
        found, seconds = timed(asked)
        row = {"products": found.products, "seconds": seconds, "set_up": set_up, "off": error and error(found)}
        rows.append({"question": question, "who": f"keras_curvature{who}", **row})

    def one(pairs):
        return off(pairs.values[0], reference["top"][0])

    cold = fewest(curvature, reference["top"][0], None)
    add("sharpness, cold", ", fewest", lambda: curvature.sharpness(steps=cold), one)
    of.at(point - EARLIER)
    start = curvature.sharpness(steps=COLD).vectors[0]
    of.at(point)
    warm = fewest(curvature, reference["top"][0], start)
    add("sharpness, warm", ", fewest", lambda: curvature.sharpness(start, warm), one)
    add("top", ", its rule", lambda: curvature.top(TOP, tolerance=SHARPNESS), lambda p: off(p.values, reference["top"]))
    for name, trace in {"Hutchinson": hutchinson, "deflated": deflated, "XTrace": xtrace}.items():
        rows.append(traced(name, trace, curvature, reference["trace"]))
    add("density", "", lambda: curvature.density(vectors=1, steps=STEPS))
    return rows


def traced(name, trace, curvature, reference):
    """The row of a trace, over `SEEDS`."""
    found = [timed(trace, curvature, seed) for seed in SEEDS]
    return {
        "question": "trace", "who": f"keras_curvature, {name}", "set_up": None,
        "products": statistics.mean(products for (_, products), _ in found),
        "seconds": statistics.mean(seconds for _, seconds in found),
        "off": root_mean_square([off(value, reference) for (value, _), _ in found]),
    }  # fmt: skip


def hutchinson(curvature, seed, estimate=traces.hutchinson, begin=10):
    """`(trace, products)`: the standard error of ten products foretells how many more are needed."""
    like = curvature.objective.weights
    first = estimate(curvature, like, products=begin, seed=seed)
    more = math.ceil(begin * (first.stderr / (TRACE * abs(first.value))) ** 2) - begin
    if more < 2:
        return first.value, begin
    second = estimate(curvature, like, products=more, seed=len(SEEDS) + seed)
    return (begin * first.value + more * second.value) / (begin + more), begin + more


def deflated(curvature, seed):
    """`(trace, products)`: the largest eigenvalues first, and then as `hutchinson` for the rest."""
    pairs = curvature.top(TOP, tolerance=10 * SHARPNESS)
    value, products = hutchinson(curvature, seed, functools.partial(_deflated, pairs))
    return value, pairs.products + products


def _deflated(pairs, operator, like, products, seed):
    return traces.deflated(operator, like, pairs, products, seed)


def xtrace(curvature, seed, begin=12):
    """`(trace, products)`: twice as many until the standard error is small enough; XTrace cannot go on where it was."""
    total = products = 0
    while True:
        products = 2 * products or begin
        found = traces.xtrace(curvature, curvature.objective.weights, products, seed)
        total += products
        if found.stderr <= TRACE * abs(found.value) or products > MOST:
            return found.value, total


def their(ask, path, **options):
    """What `torch_peers.py` answers."""
    script = pathlib.Path(__file__).with_name("torch_peers.py")
    command = [sys.executable, str(script), path, json.dumps({"ask": ask, **options})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def to_install():
    """The names of the packages that are not there."""
    return [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]


def asked_of(name, of, points, with_peers, say):
    """Prints the rows of one network."""
    point, rows = points[-1], []
    model = of.at(point)
    curvature, set_up = timed(lambda: kc.curvature(model, (of.x, of.y), batch_size=len(of.x)))
    _, product = timed(lambda: curvature @ random_vector(curvature, 0))  # traced here, once for all questions
    loss = float(curvature.loss)
    weights = f"{model.count_params()} weights, {len(of.x)} examples"
    say(f"\n== {name}: {weights}, {point} steps of training, loss {loss:.4f}\n")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "network.npz")
        of.save(path)
        reference = their("references", path, point=point, top=TOP) if with_peers else references(curvature)
        if with_peers and off(reference["loss"], loss) > 1e-5:
            raise RuntimeError(f"the losses differ: {loss} in Keras, {reference['loss']} in torch")
        of.at(point)
        rows += questions(curvature, of, point, reference, set_up + product)
        if with_peers:
            products = {row["who"].split(", ")[1]: row["products"] for row in rows if row["question"] == "trace"}
            like_ours = {name: 2 * math.ceil(products[name] / 2) for name in ("Hutchinson", "XTrace")}
            rows += their(
                "questions", path, point=point, earlier=point - EARLIER, reference=reference, sharpness=SHARPNESS,
                trace=TRACE, like_ours=like_ours, steps=STEPS, most=MOST, seeds=SEEDS,
            )  # fmt: skip
    say_rows(rows, say)
    cold, warm = fewest_in_training(curvature, of, points)
    say(f"\nproducts to {SHARPNESS:g} at steps {', '.join(map(str, points))}: cold from 3 random vectors each")
    say(f"{of_all(cold)}, {verdict(cold[-1], COLD)}; warm {of_all(warm)}, {verdict(warm[-1], WARM)}")


def say_rows(rows, say):
    """The table, a question after the other."""
    titles = {
        "sharpness, cold": f"sharpness to {SHARPNESS:g}, cold", "sharpness, warm": f"sharpness to {SHARPNESS:g}, warm",
        "top": f"top {TOP} to {SHARPNESS:g}", "trace": f"trace to {TRACE:.0%}", "density": f"density, {STEPS} steps",
    }  # fmt: skip
    targets = {"sharpness, cold": COLD, "sharpness, warm": WARM}
    say(f"{'':<26} {'':<28} {'products':>8} {'seconds':>8} {'set up':>7} {'off by':>8}  target")
    for question, title in titles.items():
        for row in (row for row in rows if row["question"] == question):
            target = verdict(row["products"], targets[question]) if "fewest" in row["who"] and ours(row) else ""
            say(f"{title:<26} {row['who']:<28} {numbers(row)}  {target}".rstrip())
            title = ""


def numbers(row):
    """What a row says after its name."""
    if "failed" in row:
        return f"fails: {row['failed']}"
    set_up = "" if row["set_up"] is None else f"{row['set_up']:.2f}"
    error = "" if row["off"] is None else f"{row['off']:.1e}"
    return f"{row['products']:>8.4g} {row['seconds']:>8.3f} {set_up:>7} {error:>8}"


def ours(row):
    """Whether a row is this package's."""
    return row["who"].startswith("keras_curvature")


def of_all(products):
    """Numbers in order of size, in words."""
    return f"median {statistics.median(products):g}, most {products[-1]}"


def verdict(value, target, unit=""):
    """The target and whether it is reached."""
    return f"<= {target}{unit} {'yes' if value <= target else 'NO'}"


# Training with the board.


class Clock(keras.callbacks.Callback):
    """Counts steps and seconds, and ends training after so many of these.

    Attributes:
        steps: Training steps, without the first of each `fit`.
        seconds: What they took.
    """

    def __init__(self, limit):
        super().__init__()
        self.limit, self.steps, self.seconds, self._before = limit, 0, 0.0, None

    def on_train_begin(self, logs=None):
        """A new turn."""
        self._before, self._end = None, self.seconds + self.limit

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the clock."""
        now = self.now()
        if self._before is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self._before
        self._before = now
        self.model.stop_training = self.seconds >= self._end

    def now(self):
        """Seconds."""
        return time.perf_counter()


class Turns(Clock):
    """The clock of a model with a board, which lets another model train for as long after every `TURN` seconds.

    Args:
        limit: Seconds of training with the board.
        board: The board. Neither for it nor here the time of the other model passes.
        other: A function that trains the other model for so many seconds.
    """

    def __init__(self, limit, board, other):
        super().__init__(limit)
        self._board, self._other, self._away, self._next = board, other, 0.0, TURN
        board._clock = self.clock

    def clock(self):
        """Seconds of this model."""
        return time.perf_counter() - self._away

    def now(self):
        """Of these, without what the board does only once."""
        return self.clock() - self.once()

    def once(self):
        """Seconds of what the board does only once, but for what comes after training."""
        return sum(seconds for kind, seconds in self._board._budget.once.items() if kind != "report")

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the clock; now and then it is the other one's turn."""
        super().on_train_batch_end(batch, logs)
        if self.seconds >= self._next:
            self._next += TURN
            self._away += timed(self._other, TURN)[1]


def board_cost(name, seconds, say):
    """The row of one network: the one with the board and another one without it, by turns."""
    problem = kc.problems.get(name)
    batches = tf.data.Dataset.from_tensor_slices(problem.sample(2048)).repeat().batch(BATCHES[name])
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread is waited for, for a second, when an iterator is deleted
    batches = batches.with_options(options)
    watched, plain = (problem.compiled("adam", jit_compile=False) for _ in range(2))
    without = Clock(TURN)

    def fit(model, *callbacks):
        model.fit(batches, steps_per_epoch=200, epochs=10**6, shuffle=False, callbacks=list(callbacks), verbose=0)

    fit(plain, Clock(0.0))  # traced
    with tempfile.TemporaryDirectory() as folder:
        board = kc.callbacks.CurvatureBoard(folder, budget=BUDGET, report_at=None)
        clock = Turns(seconds, board, lambda _: fit(plain, without))
        fit(watched, clock, board)
    budget, measurements = board._budget, board._measurements
    milliseconds = [1e3 * c.seconds / c.steps for c in (without, clock)]
    adds, own = milliseconds[1] / milliseconds[0] - 1, sum(budget.spent.values()) / budget.elapsed
    target = verdict(round(100 * adds, 1), 100 * BUDGET, " %")
    row = f"{name:<12} {milliseconds[0]:>8.2f} {milliseconds[1]:>8.2f} {adds:>7.1%}  {target:<13} {own:>7.1%}"
    say(f"{row} {measurements:>12} {clock.steps:>7} {clock.once():>8.1f}")


def boards(names, seconds, say):
    """The table of the board."""
    say(f"\n\n== CurvatureBoard(budget={BUDGET}), Adam: {seconds:g} s of training with it, and as long without it\n")
    head = f"{'':<12} {'ms/step':>8} {'with it':>8} {'adds':>7}  {'target':<13} {'own':>7}"
    say(f"{head} {'measurements':>12} {'steps':>7} {'once, s':>8}")
    for name in names:
        board_cost(name, seconds, say)


# The report.


def report_cost(of, point, say):
    """Seconds and products of a report by its parts, as it says itself, and what drawing and writing take."""
    model = of.at(point)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = os.path.join(folder, "curvature")
        result, seconds = timed(lambda: kc.report(model, (of.x, of.y), path=path))
    cost = result["cost"]
    say(f"\n\n== report of the cnn: {result['weights']} weights, {result['examples']} examples, tracing included\n")
    say(f"{'':<26} {'products':>8} {'seconds':>8}")
    for name, part in cost["parts"].items():
        say(f"{name:<26} {part['products']:>8} {part['seconds']:>8.2f}")
    say(f"{'text, json and figure':<26} {'':>8} {seconds - cost['seconds']:>8.2f}")
    say(f"{'all':<26} {cost['products']:>8} {seconds:>8.2f}  {verdict(seconds, REPORT, ' s')}")


def versions(with_peers):
    """Of what is measured."""
    found = {"TensorFlow": tf.__version__, "Keras": keras.__version__, "keras_curvature": kc.__version__}
    if with_peers:
        found |= {name: importlib.metadata.version(name) for name in (*PEERS, "scipy")}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main():
    parser = argparse.ArgumentParser(description="What it costs to watch the curvature.")
    parser.add_argument("--data_dir", help="folder of TensorFlow Datasets with MNIST; without it made-up images")
    parser.add_argument("--out", help="write what is printed to this file too")
    parser.add_argument("--examples", type=int, nargs=2, default=(1024, 256), help="for the questions to mlp and cnn")
    parser.add_argument("--points", type=int, nargs="+", default=(20, 100, 300), help="training steps of the questions")
    parser.add_argument("--seconds", type=float, default=26, help="of training with the board")
    parser.add_argument("--only", nargs="+", choices=("questions", "board", "report"), help="some of the tables")
    args = parser.parse_args()
    with printing(args.out) as say:
        report(args, say)


def report(args, say):
    """The tables that are asked for."""
    missing = to_install()
    said = "MNIST" if args.data_dir else "made-up images in place of MNIST"
    say(f"{versions(not missing)}; {os.cpu_count()} cores ({platform.machine()}), {said}")
    if missing:
        say(f"no rows of other packages: pip install {' '.join(missing)}")
    wanted, points = args.only or ("questions", "board", "report"), sorted(args.points)
    keras.utils.set_random_seed(0)
    cnn = subject(mnist_cnn(), mnist(args.data_dir), points)
    if "questions" in wanted:
        mlp = subject(digits_mlp(), kc.problems.data("digits")[0], points)
        for name, of, examples in zip(("mlp", "cnn"), (mlp, cnn), args.examples):
            asked_of(name, of.first(examples), points, not missing, say)
    if "board" in wanted:
        boards(BATCHES, args.seconds, say)
    if "report" in wanted:
        report_cost(cnn, points[-1], say)


if __name__ == "__main__":
    main()
