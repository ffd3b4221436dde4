"""muP: learning rates and initial weights with which networks of all widths learn alike.

A step should change the outputs of every layer by an amount that does not depend on the width. Let `n_in` and `n_out`
be the growth of a kernel's inputs and outputs from a base model to a wider one. Kernels with growing inputs then have
initial weights smaller by `n_in^-1/2`, or by `1 / n_in` if their outputs do not grow, as those of an output layer.
Slopes are then of size 1 / width, and the factors on the learning rate are `n_out^p n_in^-q`, with `(p, q)` by the size
of the step for a gradient `G = a s'` of inputs `a` and slopes `s`:

    "gradient"   (1, 1)       as long as the gradient
    "adam"       (0, 1)       entries of a fixed size: `SOAP`, `SophiaG`, `Shampoo`, which takes the length of Adam
    "spectral"   (1/2, 1/2)   a fixed spectral norm: `Shampoo(grafting=None)`
    "foof"       (1, 0)       A^-1 G, with `A` the second moment of the inputs: `FOOF`
    "kfac"       (0, 0)       A^-1 G B^-1, with `B` that of the slopes: `KFAC`; or a factor in the method that does the
                              same: `Muon(scale="scion", adam_for=[])`

Biases are kernels with one input. `tests/test_widths.py` measures these rows. References: Yang and Hu, "Feature
learning in infinite-width neural networks" (2021); Yang et al., "Tensor programs V" (2022), for Adam; Ishikawa and
Karakida, "On the parameterization of second-order optimization effective towards the infinite width" (2024), for K-FAC
and Shampoo: with the exponents `e_A` and `e_B` of their two factors, `p = 1 - e_B` and `q = 1 - e_A`.
"""

import dataclasses
import math

import keras
import numpy as np

from keras_curvature import keras_internals
from keras_curvature.component import check
from keras_curvature.linearization.layers.ends import EMBEDDINGS, is_kernel
from keras_curvature.operators.unfolding import Unfolding

POWERS = {"gradient": (1.0, 1.0), "adam": (0.0, 1.0), "spectral": (0.5, 0.5), "foof": (1.0, 0.0), "kfac": (0.0, 0.0)}
EXPECTED = ", ".join(f'"{name}"' for name in POWERS)


@dataclasses.dataclass(frozen=True)
class MupScales:
    """Factors for the weights of a model.

    Attributes:
        rates: A factor on the learning rate of each trainable weight, a list of floats: an optimizer's `scales`.
        initial: A factor on the initial value of each trainable weight, a list of floats.
    """

    rates: list[float]
    initial: list[float]

    def initialize(self, model: keras.Model) -> None:
        """Multiply the trainable weights of a model that was not trained yet by `initial`."""
        for variable, factor in zip(model.trainable_variables, self.initial, strict=True):
            variable.assign(factor * variable)


def mup_scales(model: keras.Model, base: keras.Model, steps: str) -> MupScales:
    """Learning rates and initial weights of a wide model, for which the learning rate of a narrow one is right (muP).

        rate = n_out^p n_in^-q,      initial = (rms of the base's weight) n_in^-a / (rms of the model's weight)

    with `n_in` and `n_out` the growth of a kernel's inputs and outputs from `base` to `model`. `a` is 0 for kernels
    whose inputs do not grow, 1/2 for those whose outputs grow too, else 1. `(p, q)` depends on the method: see
    `optimizers/widths.py` for the table, the references and what was measured.

    Tune the learning rate on `base`, and train `model` with it. `base` is the same network in other widths, freshly
    initialized. Two limits: (1) where attention heads become wider, their scores should be divided by the width; Keras
    divides by its root. (2) A `damping` or `epsilon` that is large beside what it is added to makes steps of another
    size, and so does a limit on the step such as `kl_clip`. The optimizer takes these factors as `scales`, as every
    method does that hands a whole step to Keras.

    Args:
        model: A built `keras.Model`, not trained yet.
        base: A built `keras.Model` with the same weights in other widths.
        steps: `"gradient"`, `"adam"`, `"spectral"`, `"foof"` or `"kfac"`.

    Returns:
        `MupScales`, with the attributes `rates` and `initial` and the method `initialize(model)`.

    Raises:
        ValueError: `model` or `base` is not a built model; their weights differ in number or in numbers of axes;
            `steps` is unknown.

    Example:

    ```python
    scales = keras_curvature.mup_scales(build(width=512), build(width=64), "adam")
    scales.initialize(model)
    model.compile(optimizer=keras_curvature.SOAP(rate_of_width_64, scales=scales.rates), loss="mse")
    ```
    """
    for name, value in (("model", model), ("base", base)):
        built = isinstance(value, keras.Model) and bool(value.trainable_variables)
        check(mup_scales, name, value, built, "a built `keras.Model` with trainable weights")
    check(mup_scales, "steps", steps, isinstance(steps, str) and steps in POWERS, EXPECTED)
    wide, narrow = model.trainable_variables, base.trainable_variables
    if len(wide) != len(narrow):
        raise ValueError(
            f"`mup_scales`: `base` must have the weights of `model` in other widths. Received: {len(narrow)} trainable "
            f"weights in `base` and {len(wide)} in `model`."
        )
    for v, w in zip(wide, narrow):
        _check_pair(v, w)
    alone = _without_inputs(model)
    growths = [_growth(v, w, id(v) in alone) for v, w in zip(wide, narrow)]
    p, q = POWERS[steps]
    rates = [outputs**p * inputs**-q for inputs, outputs in growths]
    return MupScales(rates, [_initial(v, w, *growth) for v, w, growth in zip(wide, narrow, growths)])


def _check_pair(variable, of_base):
    if len(variable.shape) != len(of_base.shape) or variable.name != of_base.name:
        raise ValueError(
            "`mup_scales`: `base` must have the weights of `model` in other widths, in the same order. Received: "
            f"{of_base.path} of shape {tuple(of_base.shape)} in `base` where `model` has {variable.path} of shape "
            f"{tuple(variable.shape)}."
        )


def _without_inputs(model):
    """The ids of kernels whose rows are no sums over inputs: embeddings, and convolutions of single channels."""
    found = set()
    for layer in keras_internals.layers_of(model):
        if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
            found |= {id(v) for v in layer.weights}
        found |= {id(v) for v in layer.weights if v.name in (EMBEDDINGS, "depthwise_kernel")}
    return found


def _growth(variable, of_base, alone):
    """`(n_in, n_out)` of a weight: how many times as many inputs and outputs as in the base."""
    if not is_kernel(variable):
        return 1.0, math.prod(variable.shape) / math.prod(of_base.shape)
    if alone:  # of single inputs: an embedding's vocabulary is none
        return 1.0, math.prod(variable.shape[1:]) / math.prod(of_base.shape[1:])
    (rows, columns), (base_rows, base_columns) = (Unfolding(tuple(v.shape)).size for v in (variable, of_base))
    return rows / base_rows, columns / base_columns


def _initial(variable, of_base, inputs, outputs):
    sizes = [float(np.sqrt(np.mean(np.square(keras.ops.convert_to_numpy(v))))) for v in (variable, of_base)]
    power = 0.0 if inputs == 1.0 else 0.5 if outputs != 1.0 else 1.0
    return sizes[1] * inputs**-power / sizes[0] if all(sizes) else 1.0
