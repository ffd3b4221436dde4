"""`PROBLEMS`: every problem by name.

| name                            | model                                   | data                          |
|---------------------------------|-----------------------------------------|-------------------------------|
| `quadratic`                     | 20 weights, condition number 1000       | ones; Hessian, solution known |
| `rosenbrock`, `.._noise_{1,3}`  | 2 weights; noise none, U[0, 1), U[0, 3) | the noise; solution known     |
| `rahimi_recht`                  | linear 6-10-10                          | 1000 samples; a solution known|
| `logistic`                      | 100 weights, condition number 1e4       | 20000 synthetic samples       |
| `sinc`                          | 1-20-1, tanh                            | 20000 points of a curve       |
| `poisson_2d`                    | residuals of a network 2-32-1, tanh     | 1020 points of the square     |
| `digits_mlp`                    | 64-64-32-10, tanh                       | scikit-learn's digits         |
| `digits_autoencoder`            | 64-100-50-12 and back                   | scikit-learn's digits         |
| `mnist_mlp`                     | 784-128-64-10, relu                     | MNIST                         |
| `curveball_mlp`                 | 784-128-64-32-10, tanh                  | MNIST                         |
| `autoencoder`                   | 784-1000-500-250-30 and back            | MNIST                         |
| `curveball_cnn`, `.._bn`        | the CurveBall paper's five convolutions | CIFAR-10                      |
| `mlp`                           | 784-512-512-10, relu                    | synthetic images              |
| `cnn`, `cnn_bn`                 | three convolutions, two dense layers    | synthetic images              |
| `transformer`                   | two blocks, width 64                    | synthetic tokens              |
| `lstm`                          | 32 units, 16 steps                      | the adding problem            |

Problems on MNIST and CIFAR-10 take `data(data_dir=..., download=...)`, and have a `stand_in` that needs no files.
"""

from functools import partial

import keras

from keras_curvature.problems import networks
from keras_curvature.problems.analytic import quadratic, rahimi_recht, rosenbrock
from keras_curvature.problems.base import Problem, seeded
from keras_curvature.problems.datasets import data, synthetic
from keras_curvature.problems.logistic_regression import logistic
from keras_curvature.problems.losses import squared_error_of_logits
from keras_curvature.problems.physics import poisson
from keras_curvature.problems.regression import sinc


def get(name: str) -> Problem:
    """The problem of this name in `PROBLEMS`.

    Raises:
        ValueError: There is no problem of this name.

    Example: `problems.get("digits_mlp").model(seed=1)`
    """
    if name not in PROBLEMS:
        raise ValueError(f"`get`: `name` must be one of {list(PROBLEMS)}. Received: name={name!r}")
    return PROBLEMS[name]


def _classifier(name, build, data, batch_size, stand_in=None):
    return Problem(
        name=name,
        model=seeded(partial(build, name=name)),
        loss=partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True),
        data=data,
        batch_size=batch_size,
        metrics=("accuracy",),
        stand_in=stand_in,
    )


def _autoencoder(name, widths, data, batch_size, stand_in=None):
    return Problem(
        name=name,
        model=seeded(partial(networks.autoencoder, widths, name=name)),
        loss=partial(keras.losses.BinaryCrossentropy, from_logits=True),
        data=data,
        batch_size=batch_size,
        metrics=(squared_error_of_logits,),
        stand_in=stand_in,
    )


def _flat_mnist(data_dir=None, download=False):
    return tuple((x.reshape(len(x), 784), y) for x, y in data("mnist", data_dir, download))


def _flat_images(samples=2048, seed=0):
    x, y = synthetic("images", samples, seed)
    return x.reshape(samples, 784), y


def _mnist_onto_itself(data_dir=None, download=False):
    return tuple((x, x) for x, _ in _flat_mnist(data_dir, download))


def _images_onto_themselves(samples=2048, seed=0):
    x, _ = _flat_images(samples, seed)
    return x, x


def _digits_onto_themselves():
    return tuple((x, x) for x, _ in data("digits"))


_mlp, _cnn, _curveball_cnn = networks.mlp, networks.cnn, networks.curveball_cnn
_digits = partial(data, "digits")
_cifar10 = partial(data, "cifar10")
_color_images = partial(synthetic, "images", shape=(32, 32, 3))
_tokens = partial(synthetic, "tokens")
_adding = partial(synthetic, "adding")

_ALL = [
    quadratic(),
    rosenbrock(),
    rosenbrock(noise=1),
    rosenbrock(noise=3),
    rahimi_recht(),
    logistic(),
    sinc(),
    poisson(),
    _classifier("digits_mlp", partial(_mlp, (64, 64, 32, 10), "tanh"), _digits, 64),
    _autoencoder("digits_autoencoder", (64, 100, 50, 12), _digits_onto_themselves, 200),
    _classifier("mnist_mlp", partial(_mlp, (784, 128, 64, 10), "relu"), _flat_mnist, 128, _flat_images),
    _classifier(
        "curveball_mlp", partial(_mlp, (784, 128, 64, 32, 10), "tanh"), _flat_mnist, 64, _flat_images
    ),
    _autoencoder("autoencoder", (784, 1000, 500, 250, 30), _mnist_onto_itself, 200, _images_onto_themselves),
    _classifier("curveball_cnn", partial(_curveball_cnn, False), _cifar10, 128, _color_images),
    _classifier("curveball_cnn_bn", partial(_curveball_cnn, True), _cifar10, 128, _color_images),
    _classifier("mlp", partial(_mlp, (784, 512, 512, 10), "relu"), _flat_images, 128, _flat_images),
    _classifier("cnn", partial(_cnn, False), _color_images, 128, _color_images),
    _classifier("cnn_bn", partial(_cnn, True), _color_images, 128, _color_images),
    _classifier("transformer", networks.transformer, _tokens, 64, _tokens),
    _classifier("lstm", networks.lstm, _adding, 64, _adding),
]
PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in _ALL}
