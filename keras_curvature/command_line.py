"""The console script: `keras-curvature report model.keras --data mnist` prints the report of a saved model."""

import argparse
import inspect
import math
import os
import sys

import keras
import numpy as np

import keras_curvature.optimizers  # noqa: F401
import keras_curvature.training.models  # noqa: F401, saved models may contain these classes
from keras_curvature.monitor.objective.kinds import KINDS
from keras_curvature.monitor.report.reporting import report
from keras_curvature.problems import data

DATA = ("cifar10", "digits", "mnist")


def main(arguments=None):
    """Run a subcommand. Exit status 1: model and data do not match; 2: an argument is wrong."""
    parser = argparse.ArgumentParser(prog="keras-curvature", description="Measure the curvature of Keras models.")
    subcommands = parser.add_subparsers(dest="subcommand", required=True)
    of_report = _add_report(subcommands)
    given = parser.parse_args(arguments)
    _report(of_report, given)


def _report(parser, given):
    """Load the model and the data, and print the report."""
    try:
        model, (x, y) = _model(given), _data(given)
        x = _as_the_model_takes(model, x)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    try:
        report(model, (x, y), given.path, given.kind, given.training, given.examples, given.seed,
               batch_size=given.batch_size)  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _add_report(subcommands):
    parser = subcommands.add_parser(
        "report",
        help="print the curvature of a saved model as a table",
        description="Measure the curvature of a saved model's loss on some data, and print it as a table: the "
        "sharpness against the limit of the optimizer, the trace, the noise scale, and the share of each layer.",
        epilog="Example: keras-curvature report model.keras --data mnist --data_dir ~/tensorflow_datasets "
        "--path curvature",
    )
    parser.add_argument("model", help="the file that model.save(...) wrote, such as model.keras")
    parser.add_argument(
        "--data", required=True, help="mnist, cifar10 or digits (the training examples), or a file data.npz with "
        "arrays x and y",
    )  # fmt: skip
    parser.add_argument("--data_dir", help="the folder of TensorFlow Datasets (default: $TFDS_DATA_DIR)")
    parser.add_argument("--examples", type=int, default=1024, help="how many examples to use (default: 1024)")
    parser.add_argument("--kind", choices=list(KINDS), default="hessian", help="which matrix (default: hessian)")
    parser.add_argument(
        "--training", action="store_true", help="run layers in training mode, with dropout and the statistics of each "
        "batch of --batch_size",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, help="number of examples in a batch; matters only with --training")
    parser.add_argument("--path", help="also write PATH.png, PATH.json and PATH.txt")
    parser.add_argument("--loss", help="the Keras name of the loss, for a model that was saved without one")
    parser.add_argument(
        "--from_logits", action="store_true", help="with --loss: the outputs are logits, not probabilities"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser


def _model(given):
    if not os.path.exists(given.model):
        raise ValueError(f"the model must be a file that model.save(...) wrote; there is no file {given.model!r}")
    model = keras.models.load_model(given.model)
    if given.loss is not None:
        model.compile(optimizer=getattr(model, "optimizer", None), loss=_loss(given.loss, given.from_logits))
    if not model.compiled:
        raise ValueError(
            f"the model in {given.model!r} was saved without a loss. Pass one, such as: "
            "--loss sparse_categorical_crossentropy --from_logits"
        )
    return model


def _loss(name, from_logits):
    if not from_logits:
        return keras.losses.get(name)
    # find the class for either `snake_case` or `CamelCase`: the functions do not keep `from_logits`
    found = getattr(keras.losses, "".join(word[:1].upper() + word[1:] for word in name.split("_")), None)
    if found is None or "from_logits" not in inspect.signature(found).parameters:
        raise ValueError(
            "--from_logits needs a cross-entropy, such as --loss sparse_categorical_crossentropy. "
            f"Received: --loss {name}"
        )
    return found(from_logits=True)


def _data(given):
    """`(x, y)`."""
    if given.data in DATA:
        return data(given.data, given.data_dir)[0]
    if not given.data.endswith(".npz"):
        raise ValueError(f"--data must be one of {', '.join(DATA)}, or a .npz file. Received: --data {given.data}")
    if not os.path.exists(given.data):
        raise ValueError(f"--data must be a file that exists; there is no file {given.data!r}")
    with np.load(given.data) as arrays:
        if not {"x", "y"} <= set(arrays.files):
            have = ", ".join(arrays.files) or "no arrays"
            raise ValueError(f"--data must be a file with the arrays x and y. Received: {given.data!r} with {have}")
        return arrays["x"], arrays["y"]


def _as_the_model_takes(model, x):
    """Reshape images to rows of pixels, or rows to images, for the model."""
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or None in shape[1:] or x.shape[1:] == shape[1:]:
        return x
    if math.prod(shape[1:]) != math.prod(x.shape[1:]):
        raise ValueError(
            f"--data must have examples of shape {shape[1:]} for this model. Received: examples of shape {x.shape[1:]}"
        )
    return x.reshape(-1, *shape[1:])
