"""How well `kc.auto` chooses: seconds to Adam's loss, beside Adam, tuned Adam, and the best of all in hindsight.

    pip install ".[examples]"
    python examples/benchmarks/auto.py --data_dir DIR --out examples/benchmarks/results/auto

takes about an hour of one core. `DIR` holds MNIST and CIFAR-10 of TensorFlow Datasets. Every finished run is a line of
`auto.jsonl`; after an interruption the same command goes on. `--only_print` writes the table alone.

Twelve problems that no default, and no rule of `kc.auto`, was chosen with: three of text (docstrings), images, tables
and regressions. Each optimizer trains the same curved model from the same weights, at its defaults, for `--seconds`
of one thread after tracing. The target is the loss that `keras.optimizers.Adam()` has at the end; a loss is the mean
over the last twentieth of the time and at least five batches. Tuned Adam is the best of six rates.

`kc.auto` chooses once, with 20 s, before anything else runs on the problem. Its 20 s are not counted.
"""

import argparse
import functools
import inspect
import math
import os
import pathlib
import re
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import numpy as np
import sklearn.datasets
import sklearn.preprocessing
import tensorflow as tf
from batch_scaling import add_line, lines_of  # which stands beside this file
from keras import layers

import keras_curvature as kc
from keras_curvature.monitor.choosing.race import Losses
from keras_curvature.problems import networks

RATES = (1e-4, 3e-4, 3e-3, 1e-2, 3e-2)
OTHERS: dict[str, Callable] = {
    "GaussNewton, Levenberg-Marquardt": kc.GaussNewton.levenberg_marquardt, "LBFGS": kc.LBFGS, "SOAP": kc.SOAP,
    "Muon": kc.Muon, "KFAC": kc.KFAC, "SquareRootFreeAdam": kc.SquareRootFreeAdam, "KLShampoo": kc.KLShampoo,
}  # fmt: skip
METHODS: dict[str, Callable] = {
    "Adam": keras.optimizers.Adam,
    **{f"Adam {rate:g}": lambda rate=rate: keras.optimizers.Adam(rate) for rate in RATES},
    **OTHERS,
}
WHOLE = ("GaussNewton, Levenberg-Marquardt", "LBFGS")  # run where a batch is all of the data


# The problems: a model, its data, the batch size, and the loss.

loaded = functools.cache(kc.problems.data)


def docstrings(module):
    """The docstrings of a module's public members, one string."""
    members = [getattr(module, name) for name in dir(module) if not name.startswith("_")]
    return "\n".join(filter(None, map(inspect.getdoc, members)))


def windows(text, length, seed=0, count=20_000):
    """`count` windows of `length` characters, as numbers below 96."""
    codes = np.clip(np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype("int32") - 31, 0, 95)
    starts = np.random.RandomState(seed).randint(0, len(codes) - length, count)
    return codes[starts[:, None] + np.arange(length)]


def next_character(data_dir):
    """A GRU that predicts the next characters of NumPy's docstrings."""
    codes = windows(docstrings(np), 33)
    model = keras.Sequential([
        keras.Input((32,)), layers.Embedding(96, 32), layers.GRU(64, return_sequences=True), layers.Dense(96)
    ])  # fmt: skip
    return model, codes[:, :-1], codes[:, 1:], 32, "classes"


def which_module(data_dir):
    """A transformer that tells from 32 characters which of six modules a docstring is of."""
    modules = [np, np.linalg, tf.math, tf.data, sklearn.preprocessing, keras.layers]
    codes = np.concatenate([windows(docstrings(module), 32, i, 3000) for i, module in enumerate(modules)])
    model = networks.transformer(vocabulary=96, length=32, width=32, heads=2, blocks=1, classes=6)
    return model, codes, np.repeat(np.arange(6, dtype="int32"), 3000), 64, "classes"


def bag_of_words(data_dir):
    """An average of word vectors that tells whether 16 words are of Keras' layers or of its operations."""
    texts = [re.findall(r"[a-z]+", docstrings(module).lower()) for module in (keras.layers, keras.ops)]
    known = {word: i for i, word in enumerate(sorted({w for text in texts for w in text}))}
    x = [[known[w] for w in text[i : i + 16]] for text in texts for i in range(0, len(text) - 16, 4)]
    y = [label for label, text in enumerate(texts) for _ in range(0, len(text) - 16, 4)]
    model = keras.Sequential([
        keras.Input((16,)), layers.Embedding(len(known), 64), layers.GlobalAveragePooling1D(),
        layers.Dense(64, activation="relu"), layers.Dense(2),
    ])  # fmt: skip
    return model, np.array(x, "int32"), np.array(y, "int32"), 32, "classes"


def mnist(data_dir):
    """A small LeNet."""
    (x, y), _ = loaded("mnist", data_dir)
    model = keras.Sequential([
        keras.Input((28, 28, 1)), layers.Conv2D(8, 5, activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(16, 5, activation="relu"), layers.MaxPooling2D(), layers.Flatten(), layers.Dense(64, "relu"),
        layers.Dense(10),
    ])  # fmt: skip
    return model, x, y, 128, "classes"


def cifar10_patches(data_dir):
    """A transformer of 8 by 8 patches."""
    (x, y), _ = loaded("cifar10", data_dir)
    inputs = keras.Input((32, 32, 3))
    z = layers.Reshape((16, 48))(layers.Conv2D(48, 8, 8)(inputs))
    for _ in range(2):
        a = layers.LayerNormalization()(z)
        z = z + layers.MultiHeadAttention(3, 16)(a, a)
        z = z + layers.Dense(48)(layers.Dense(96, activation="gelu")(layers.LayerNormalization()(z)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(z))), x, y, 64, "classes"


def denoising(data_dir):
    """A convolutional autoencoder that takes noise from pieces of two photographs."""
    photographs, random = sklearn.datasets.load_sample_images().images, np.random.RandomState(0)
    corners = [(random.randint(2), random.randint(400), random.randint(600)) for _ in range(8000)]
    y = np.stack([photographs[i][r : r + 16, c : c + 16] for i, r, c in corners]).astype("float32") / 255
    model = keras.Sequential([
        keras.Input((16, 16, 3)), layers.Conv2D(16, 3, 2, "same", activation="relu"),
        layers.Conv2D(32, 3, 2, "same", activation="relu"), layers.Conv2DTranspose(16, 3, 2, "same", activation="relu"),
        layers.Conv2DTranspose(3, 3, 2, "same"),
    ])  # fmt: skip
    return model, y + 0.1 * random.randn(*y.shape).astype("float32"), y, 128, "mse"


def standardized(x):
    return ((x - x.mean(0)) / (x.std(0) + 1e-8)).astype("float32")


def table(x, y, classes, batch):
    """A dense network for a table."""
    model = networks.mlp((x.shape[1], 64, 64, classes))
    return model, standardized(x), y.astype("int32"), batch, "classes"


def breast_cancer(data_dir):
    """569 rows, all in one batch."""
    return table(*sklearn.datasets.load_breast_cancer(return_X_y=True), 2, 569)


def wine(data_dir):
    """178 rows."""
    return table(*sklearn.datasets.load_wine(return_X_y=True), 3, 32)


def made_classes(data_dir):
    """20 000 generated rows of 40 columns, ten classes."""
    x, y = sklearn.datasets.make_classification(20_000, 40, n_informative=15, n_classes=10, random_state=0)
    return table(x, y, 10, 256)


def curve(x, y, batch, width=32):
    """A dense network with tanh for a regression."""
    y = y[:, None] if y.ndim == 1 else y
    return networks.mlp((x.shape[1], width, width, y.shape[1]), "tanh"), standardized(x), standardized(y), batch, "mse"


def diabetes(data_dir):
    """442 rows, all in one batch."""
    return curve(*sklearn.datasets.load_diabetes(return_X_y=True), 442)


def friedman3(data_dir):
    """Friedman's third function, with noise."""
    return curve(*sklearn.datasets.make_friedman3(5000, noise=0.1, random_state=0), 32)


def arm(data_dir):
    """Where an arm of three joints ends, all 1000 angles in one batch."""
    angles = np.random.RandomState(0).uniform(-1, 1, (1000, 3)).cumsum(1)
    ends = np.stack([np.cos(angles).sum(1), np.sin(angles).sum(1)], 1)
    return curve(angles, ends, 1000, 16)


PROBLEMS = {
    "text": (next_character, which_module, bag_of_words), "images": (mnist, cifar10_patches, denoising),
    "tables": (breast_cancer, wine, made_classes), "regressions": (diabetes, friedman3, arm),
}  # fmt: skip


def made(build, data_dir):
    """`(curved and compiled model, x, y, batch size)`."""
    keras.utils.set_random_seed(1)
    model, x, y, batch, loss = build(data_dir)
    if loss == "classes":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = kc.curved(model)
    model.compile("sgd", loss)
    return model, x, y, batch, loss


# Runs.


def train(build, data_dir, make, seconds):
    """`[(seconds, smoothed loss)]` of one run."""
    model, x, y, batch, loss = made(build, data_dir)
    model.compile(make(), loss)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1).batch(batch, drop_remainder=True).repeat()
    model.fit(data, steps_per_epoch=2, shuffle=False, verbose=0)  # traces
    losses = Losses(seconds)
    model.fit(data, steps_per_epoch=10**9, shuffle=False, verbose=0, callbacks=[losses])
    at, values = (np.array(column) for column in zip(*losses.found))
    first = np.minimum(np.searchsorted(at, at - seconds / 20), np.maximum(np.arange(len(at)) - 4, 0))
    sums = np.append(0.0, np.cumsum(values))
    smoothed = (sums[1:] - sums[first]) / (np.arange(len(at)) + 1 - first)
    kept = sorted({*np.linspace(0, len(at) - 1, 200).astype(int)})
    return [(round(float(at[i]), 3), float(f"{smoothed[i]:.5g}")) for i in kept]


def name_of(optimizer):
    """Which of `METHODS` an optimizer is."""
    return next(name for name, make in METHODS.items() if _same(make(), optimizer))


def _same(a, b):
    configs = [{**o.get_config(), "name": None} for o in (a, b)]
    return type(a) is type(b) and str(configs[0]) == str(configs[1])


def run(path, data_dir, seconds):
    """All runs that are missing."""
    for build in (build for group in PROBLEMS.values() for build in group):
        name, done = build.__name__, {(r["problem"], r["method"]) for r in lines_of(path)}
        if (name, "auto") not in done:
            model, x, y, batch, _ = made(build, data_dir)
            begin = time.perf_counter()
            chosen = name_of(kc.auto(model, (x, y), batch_size=batch))
            took = round(time.perf_counter() - begin, 1)
            entry = {"problem": name, "method": "auto", "chosen": chosen, "whole": batch == len(x), "took": took}
            add_line(path, entry)
        whole = next(r["whole"] for r in lines_of(path) if r["problem"] == name and r["method"] == "auto")
        for method, make in METHODS.items():
            if (name, method) in done or (method in WHOLE and not whole):
                continue
            if method == "GaussNewton, Levenberg-Marquardt" and build not in PROBLEMS["regressions"]:
                continue
            losses = train(build, data_dir, make, seconds)
            add_line(path, {"problem": name, "method": method, "losses": losses})
            print(f"{name:20}{method:36}{losses[-1][1]:12.5g}", flush=True)
            keras.backend.clear_session()


# The table.


def until(losses, target):
    """The first time at which the loss is at the target; infinity if never."""
    return next((at for at, loss in losses if loss <= target), math.inf)


def report(runs):
    """The lines of the table."""
    shared = "".join(f"{text:>9}" for text in ("/ Adam()", "/ tuned", "/ best"))
    yield f"{'':20}{'Adam()':>8}{'tuned':>8}  {'best in hindsight':40}{'kc.auto':38}{shared}"
    shares = []
    for group, builds in PROBLEMS.items():
        yield group
        for name in (build.__name__ for build in builds):
            found = {r["method"]: r["losses"] for r in runs if r["problem"] == name and "losses" in r}
            chosen = next((r["chosen"] for r in runs if r["problem"] == name and r["method"] == "auto"), None)
            if chosen not in found or "Adam" not in found:
                continue
            times = {method: until(losses, found["Adam"][-1][1]) for method, losses in found.items()}
            tuned = min(times[m] for m in times if m.startswith("Adam"))
            best = min((m for m in times if m not in METHODS or m == "Adam" or m in OTHERS), key=times.get)
            own = times[chosen]
            shares.append((own / times["Adam"], own / tuned, own / times[best]))
            columns = f"{best:30}{times[best]:8.1f}  {chosen:30}{own:8.1f}"
            yield f"  {name:18}{times['Adam']:8.1f}{tuned:8.1f}  {columns}" + "".join(f"{s:9.2f}" for s in shares[-1])
    if shares:
        slower, near = sum(s[0] > 1 for s in shares), sum(s[2] <= 1.5 for s in shares)
        yield f"slower than Adam(): {slower} of {len(shares)}; within 1.5 of the best: {near} of {len(shares)}"


def main():
    parser = argparse.ArgumentParser(description="How well kc.auto chooses.")
    parser.add_argument("--data_dir", help="of TensorFlow Datasets, with MNIST and CIFAR-10")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run")
    parser.add_argument("--only_print", action="store_true")
    parser.add_argument("--out", default="auto", help="the files' beginning")
    args = parser.parse_args()
    path = args.out + ".jsonl"
    if not args.only_print:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        run(path, args.data_dir, args.seconds)
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_curvature {kc.__version__}"
    head = f"{versions}; seconds of one thread to the loss of Adam() at its end"
    text = "\n".join([head, *report(lines_of(path))]) + "\n"
    print(text)
    pathlib.Path(args.out + ".txt").write_text(text)


if __name__ == "__main__":
    main()
