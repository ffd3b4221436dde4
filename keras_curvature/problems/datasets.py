"""Data sets by name, and synthetic data of the same shapes.

`data("mnist")` reads a data set. `synthetic("images")` generates one without a download: a fixed random teacher labels
random inputs, so the labels can be learned. Equal seeds give equal arrays on every machine.
"""

import os
from typing import Literal, TypeAlias

import keras
import numpy as np

Examples: TypeAlias = tuple[np.ndarray, np.ndarray]


def data(
    name: Literal["digits", "mnist", "cifar10"], data_dir: str | os.PathLike | None = None, download: bool = False
) -> tuple[Examples, Examples]:  # fmt: skip
    """Read a data set, with inputs in [0, 1] and int32 labels `(samples,)`.

    | name      | x              | train | test  | from                                          |
    |-----------|----------------|-------|-------|-----------------------------------------------|
    | `digits`  | (n, 64)        | 1437  | 360   | scikit-learn, split by class, always the same |
    | `mnist`   | (n, 28, 28, 1) | 60000 | 10000 | TensorFlow Datasets                           |
    | `cifar10` | (n, 32, 32, 3) | 50000 | 10000 | TensorFlow Datasets                           |

    Inputs have the dtype `keras.config.floatx()`.

    Args:
        name: One of the names above.
        data_dir: The folder in which TensorFlow Datasets keeps its data sets; `"digits"` needs none. Defaults to the
            environment variable `TFDS_DATA_DIR`.
        download: Whether a data set that is not in `data_dir` may be downloaded into it. Defaults to `False`.

    Returns:
        `((x_train, y_train), (x_test, y_test))`, NumPy arrays.

    Raises:
        ValueError: `name` is unknown, or no `data_dir` is known.
        FileNotFoundError: The data set is not in `data_dir` and `download` is false.
        ImportError: TensorFlow Datasets, or for `"digits"` scikit-learn, is not installed.

    Example: `(x, y), test = problems.data("mnist", data_dir="datasets", download=True)`
    """
    if name not in _READERS:
        raise ValueError(f"`data`: `name` must be one of {sorted(_READERS)}. Received: name={name!r}")
    return _READERS[name](name, data_dir, download)


def synthetic(
    kind: Literal["images", "tokens", "adding"], samples: int = 2048, seed: int = 0,
    shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10,
) -> Examples:  # fmt: skip
    """Generate synthetic examples `(x, y)` with int32 labels `(samples,)`.

    * `"images"`: `(samples, *shape)` in [0, 1]. An image is a combination of sixteen coarse patterns with coefficients
      `z ~ N(0, I)`, plus noise, because few directions carry most of the variance of real images. A random tanh network
      of `z` chooses the class.
    * `"tokens"`: `(samples, 32)`, int32 in [0, 64). The first token is the query of a random attention head over all
      tokens; the output determines one of four classes.
    * `"adding"`: `(samples, 16, 2)`, the adding problem of Hochreiter and Schmidhuber (1997) as a binary
      classification. One channel has numbers in [0, 1), the other one marks two of them; the class is whether the
      marked numbers sum to more than 1.

    Args:
        kind: `"images"`, `"tokens"` or `"adding"`.
        samples: Number of examples. Defaults to `2048`.
        seed: Determines the teacher and, together with `samples`, the examples. Defaults to `0`.
        shape: `(height, width, channels)` of images; height and width are multiples of 4. Defaults to `(28, 28, 1)`.
        classes: Number of classes of images. Defaults to `10`.

    Returns:
        `(x, y)`, NumPy arrays.

    Raises:
        ValueError: `kind` is unknown, `samples` is less than 1, or `shape` has sides that are no multiples of 4.

    Example: `x, y = problems.synthetic("images", samples=512, shape=(32, 32, 3))`
    """
    if kind not in _TEACHERS:
        raise ValueError(f"`synthetic`: `kind` must be one of {sorted(_TEACHERS)}. Received: kind={kind!r}")
    if samples < 1:
        raise ValueError(f"`synthetic`: `samples` must be at least 1. Received: samples={samples}")
    random = np.random.RandomState(seed)
    if kind == "images":
        return _images(random, samples, shape, classes)
    return _TEACHERS[kind](random, samples)  # type: ignore[operator]


def _digits(name, data_dir, download):
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        message = 'data("digits") needs scikit-learn: pip install "keras_curvature[examples]"'
        raise ImportError(message) from error
    x, y = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
    parts = train_test_split(x / 16, y, test_size=360, stratify=y, random_state=0)
    x_train, x_test = (part.astype(keras.config.floatx()) for part in parts[:2])
    y_train, y_test = (part.astype("int32") for part in parts[2:])
    return (x_train, y_train), (x_test, y_test)


def _tensorflow_dataset(name, data_dir, download):
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    if not data_dir:
        raise ValueError(
            f'`data("{name}")` reads TensorFlow Datasets from a folder. Pass data_dir="..." or set '
            f"the environment variable TFDS_DATA_DIR. Received: data_dir={data_dir!r}"
        )
    if not download and not os.path.isdir(os.path.join(data_dir, name)):
        raise FileNotFoundError(
            f'`data("{name}")`: there is no folder "{name}" in `data_dir`. Pass the folder that contains it, or '
            f"download=True to download it there. Received: data_dir={str(data_dir)!r}"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        # version 4.9.10 imports importlib_resources, but does not install it
        packages = "pip install tensorflow-datasets importlib_resources"
        raise ImportError(f'data("{name}") needs TensorFlow Datasets: {packages}') from error
    loaded = tfds.load(
        name,
        split=["train", "test"],
        data_dir=os.fspath(data_dir),
        download=download,
        as_supervised=True,
        batch_size=-1,
    )
    floatx = keras.config.floatx()
    return tuple((np.divide(x, 255, dtype=floatx), y.astype("int32")) for x, y in tfds.as_numpy(loaded))


def _images(random, samples, shape, classes):
    height, width, channels = shape
    if height % 4 or width % 4:
        raise ValueError(
            "`synthetic`: `shape` must be (height, width, channels) with height and width multiples of 4. "
            f"Received: shape={shape}"
        )
    teacher = _normal(random, 16, 32), _normal(random, 32, classes)
    coarse = random.randn(16, height // 4, width // 4, channels)
    patterns = coarse.repeat(4, axis=1).repeat(4, axis=2).reshape(16, -1) / 4  # (16, pixels)
    z = random.randn(samples, 16)
    pixels = 2 * z @ patterns + 0.5 * random.randn(samples, height * width * channels)  # (samples, pixels)
    x = 1 / (1 + np.exp(-pixels))
    y = (np.tanh(z @ teacher[0]) @ teacher[1]).argmax(axis=1)
    return x.reshape(samples, *shape).astype(keras.config.floatx()), y.astype("int32")


def _tokens(random, samples, vocabulary=64, length=32, width=8, classes=4):
    query, key, value = (random.randn(vocabulary, width) for _ in range(3))
    readout = random.randn(width, classes)
    x = random.randint(vocabulary, size=(samples, length))
    scores = np.einsum("sd,std->st", query[x[:, 0]], key[x])  # (samples, length)
    attention = np.exp(scores - scores.max(axis=1, keepdims=True))
    attention /= attention.sum(axis=1, keepdims=True)
    seen = np.einsum("st,std->sd", attention, value[x])  # (samples, width)
    return x.astype("int32"), (seen @ readout).argmax(axis=1).astype("int32")


def _adding(random, samples, length=16):
    numbers = random.rand(samples, length)
    marks = np.zeros((samples, length))
    # one mark in each half of the sequence, so that they differ
    rows = np.arange(samples)
    marks[rows, random.randint(length // 2, size=samples)] = 1
    marks[rows, random.randint(length // 2, length, size=samples)] = 1
    y = (numbers * marks).sum(axis=1) > 1
    return np.stack([numbers, marks], axis=-1).astype(keras.config.floatx()), y.astype("int32")


def _normal(random, fan_in, fan_out):
    return random.randn(fan_in, fan_out) / np.sqrt(fan_in)


_READERS = {"digits": _digits, "mnist": _tensorflow_dataset, "cifar10": _tensorflow_dataset}
_TEACHERS = {"images": _images, "tokens": _tokens, "adding": _adding}
