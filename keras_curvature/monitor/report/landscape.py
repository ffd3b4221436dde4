"""The loss along lines and planes through the weights, with the quadratic model beside it.

A picture of a loss in a million dimensions depends on the direction, and a random direction depends on the scale of the
layers: multiplying a ReLU layer by 10 and dividing the next by 10 leaves the function, but a step of the same length
then has another effect. Li et al. (2018) give each filter of a random direction the length of the filter that it moves,
which leaves the slice unchanged (when whole layers are rescaled; not when single units are).
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.component import check, check_count, check_number
from keras_curvature.monitor.matrix import Curvature
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.report.drawing import RED, blank, draw_lines, png
from keras_curvature.solvers import flat
from keras_curvature.typing import Vector

if TYPE_CHECKING:
    import matplotlib.figure

NAMES = ("sharpest", "random", "gradient")
# weights that a random direction does not move: Li et al. leave biases, scales and shifts in place
_NO_FILTERS = ("bias", "gamma", "beta", "scale", "alpha")


@dataclasses.dataclass(frozen=True)
class Landscape:
    """The result of `landscape`.

    Attributes:
        axis: Steps `t` along each direction, `(points,)`, float64, in multiples of the direction.
        loss: `{name: values}`, float64: `(points,)` for a line, `(points, points)` for a plane `"a x b"`, with steps
            along `a` in the first axis.
        quadratic: `{name: values}` in the same shapes: the quadratic model of the loss at the weights.
        directions: `{name: vector}`.
        header: What was measured, a string.
    """

    axis: np.ndarray
    loss: dict[str, np.ndarray]
    quadratic: dict[str, np.ndarray]
    directions: dict[str, Vector]
    header: str = ""

    def figure(self) -> "matplotlib.figure.Figure":
        """The lines in one panel, and each plane in one of its own, a `matplotlib.figure.Figure`."""
        planes = [name for name, values in self.loss.items() if values.ndim == 2]
        lines = [name for name in self.loss if name not in planes]
        figure, axes = blank(len(planes) + bool(lines))
        if lines:
            draw_lines(axes[0], self.axis, *({n: v[n] for n in lines} for v in (self.loss, self.quadratic)))
        for name, ax in zip(planes, axes[bool(lines) :]):
            _draw_plane(figure, ax, self.axis, name, self.loss[name])
        figure.suptitle(self.header, fontsize="medium")
        return figure

    def _repr_png_(self):
        """The display in a notebook."""
        return png(self)


def landscape(
    model: keras.Model, data: Any, directions: str | Sequence[Vector] | dict[str, Vector] = "sharpest+random",
    points: int = 41, span: float = 1.0, *, training: bool = False, examples: int | None = 1024,
    batch_size: int | None = None, seed: int = 0,
) -> Landscape:  # fmt: skip
    """The loss `f(w + t d)` along lines through the weights, beside its quadratic model.

        q(t) = f(w) + t g'd + t^2/2 d'H d,        g, H: gradient and Hessian of the loss at `w`

    Directions by name: `"sharpest"`: the eigenvector of the Hessian's largest eigenvalue, of length 1, downhill to the
    right; `"gradient"`: the gradient, of length 1; `"random"`: normal numbers, each filter scaled to the length of the
    filter of the weights, and no biases, scales or shifts (see `filter_normalized`). A plane is `"a x b"`. No weight is
    assigned: the model is evaluated as a function of them. In a terminal, a bar shows the progress.

    Reference: Li, Xu, Taylor, Studer and Goldstein (2018), "Visualizing the Loss Landscape of Neural Nets". Difference
    from their code: (1) the axes of filters are those of Keras' layers, and theirs is the first one.

    Args:
        model: A compiled `keras.Model`.
        data: As `keras_curvature.curvature` takes it: `(x, y)`, a `tf.data.Dataset` or a `PyDataset`.
        directions: Names joined by `"+"`, such as `"sharpest+random"`, `"gradient"` or `"random x random"`; or vectors
            of your own, each a list of tensors in the order of `model.trainable_variables`, in a list or in a dict by
            name; they are taken as long as they are. Defaults to `"sharpest+random"`.
        points: Number of steps along each direction, an odd one has the weights themselves in the middle; a plane
            takes `points**2` evaluations. Defaults to `41` (Li et al.: 51).
        span: The steps go from `-span` to `span`. Defaults to `1.0` (Li et al.).
        training: Whether layers run in training mode (batch statistics, dropout with fixed masks). Defaults to
            `False` (Li et al.).
        examples: Number of examples of `data` to use; `None` for all. Defaults to `1024`.
        batch_size: Number of examples in a batch; matters only in training mode. Optional.
        seed: Of random directions and of fixed masks, an integer. Defaults to `0`.

    Returns:
        A `Landscape`, with the losses as arrays and a `figure()`.

    Raises:
        ValueError: A direction is unknown, is zero, is not finite, or has other shapes than the weights; see also
            `curvature`.

    Example: `kc.landscape(model, (x, y), directions="random x random", points=21).figure().savefig("plane.png")`
    """
    check_count(landscape, "points", points, low=2)
    check_number(landscape, "span", span, low=0, open_low=True)
    if isinstance(directions, (list, tuple)):
        directions = {f"direction {i}": vector for i, vector in enumerate(directions, start=1)}
    lines = _parse(directions)
    objective = Objective(model, data, "hessian", examples, batch_size, training, seed, asked_by=landscape)
    measured = Curvature(objective)
    named = {}
    for name in dict.fromkeys(itertools.chain(*lines)):
        named[name] = _direction(name, directions, measured, seed)
    mode = f"train mode, batches of {measured.objective.batch_size}" if training else "eval mode"
    header = f"loss of {model.name}, {measured.objective.examples} examples, {mode}"
    return slices(measured, named, lines, points, span, header, progress=sys.stdout.isatty())


def slices(measured, named, lines, points=41, span=1.0, header="", progress=False):
    """The `Landscape` along `lines`, tuples of one or two names of the vectors in `named`.

    Args:
        measured: A `Curvature`, whose quadratic model is drawn; with one product for each direction.
        progress: Whether to show a bar while losses are computed. Defaults to `False`.
    """
    bar = keras.utils.Progbar(sum(points ** len(line) for line in lines), verbose=int(progress), unit_name="loss")
    axis = np.linspace(-span, span, points)
    bent = {name: measured @ vector for name, vector in named.items()}
    value, gradient = float(measured.loss), measured.gradient  # each goes through all of the examples
    loss, quadratic = {}, {}
    for line in lines:
        vectors, key = [named[name] for name in line], " x ".join(line)
        steps = np.array(list(itertools.product(axis, repeat=len(line))))  # (points ** directions, directions)
        shape = (points,) * len(line)
        loss[key] = np.array([_loss_at(measured, vectors, step, bar) for step in steps]).reshape(shape)
        rise = _quadratic(gradient, vectors, [bent[name] for name in line], steps)
        quadratic[key] = value + rise.reshape(shape)
    return Landscape(axis, loss, quadratic, named, header)


def _loss_at(measured, vectors, step, bar):
    shift = trees.scale(float(step[0]), vectors[0])
    for scale, vector in zip(step[1:], vectors[1:]):
        shift = trees.add(shift, vector, float(scale))
    bar.add(1)
    return float(measured.objective.loss_at(shift))


def _quadratic(gradient, vectors, bent, steps):
    """`c'V'g + 1/2 c'(V'HV) c` for each row `c` of `steps`."""
    slope = np.array([_dot(gradient, v) for v in vectors])
    matrix = np.array([[_dot(u, v) for v in bent] for u in vectors])
    return steps @ slope + 0.5 * np.sum(steps @ matrix * steps, axis=1)


def _dot(u, v):
    """An inner product on the host, in float64."""
    return float(sum(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(u, v)))


# Directions.


def _parse(directions):
    """The lines and planes asked for, a list of tuples of names."""
    if isinstance(directions, dict) and directions:
        return [(name,) for name in directions]
    lines = [tuple(part.split()) for part in directions.split("+")] if isinstance(directions, str) else []
    valid = bool(lines)
    for i, line in enumerate(lines):
        names = line[::2]
        valid = valid and set(names) <= set(NAMES) and line[1::2] == ("x",) * (len(names) - 1) and 1 <= len(names) <= 2
        valid = valid and (len(names) < 2 or names[0] != names[1] or names[0] == "random")
        lines[i] = (names[0], "another random") if names == ("random", "random") else names
    expected = "names among 'sharpest', 'random', 'gradient' joined by '+' or ' x ', or vectors in a list or dict"
    check(landscape, "directions", directions, valid, expected)
    return lines


def _direction(name, directions, measured, seed):
    if isinstance(directions, dict):
        argument = f"directions[{name!r}]"
        vector = trees.vector(argument, directions[name], measured.variables)
        flat.scaled(argument, flat.Layout(vector).pack(vector))  # refuses zero, and what is not finite
        return vector
    if name == "sharpest":
        return downhill(measured.top(1).vectors[0], measured.gradient)
    if name == "gradient":
        return _unit(measured.gradient)
    found = filter_normalized(measured.objective.model, seed, number=int(name != "random"))
    if not float(trees.norm(found)):
        raise ValueError(
            "`landscape`: a random direction moves filters, and the trainable weights have none (or all are zero): "
            f"biases, scales and shifts stay. Received: directions with 'random' for the model "
            f"{measured.objective.model.name!r}. Use directions='sharpest', or pass vectors."
        )
    return found


def downhill(vector, gradient):
    """`vector` or its negative, so that the loss does not rise along it; an eigenvector has no sign of its own."""
    return trees.scale(-1.0 if _dot(vector, gradient) > 0 else 1.0, vector)


def _unit(vector):
    length = math.sqrt(_dot(vector, vector))
    if not length:
        raise ValueError(
            "`landscape`: the gradient is zero at these weights and has no direction. Use directions='sharpest+random'."
        )
    return trees.scale(1.0 / length, vector)


def filter_normalized(model, seed=0, number=0):
    """A random direction in which each filter has the length of the same filter of the weights; a vector.

        d_f = z_f |w_f| / |z_f|,        z normal,        f: the weights of one output

    A filter is a column of a dense kernel (per gate, in recurrent layers), or a row of an embedding. In a convolution
    it is the kernel of one output channel, in a depthwise convolution the kernel of one channel. In an `EinsumDense` it
    is all weights of one output. In other layers the weights with the same last index form a filter. Biases, scales and
    shifts of normalizations have a direction of zero.

    Args:
        model: A built `keras.Model`.
        seed, number: The direction is a function of both, integers.

    Returns:
        A list of tensors in the order of `model.trainable_variables`.
    """
    axes = filter_axes(model)
    # seeds below zero, which no other random vector of the package has
    seeds = ([seed, -1 - i - 1000 * number] for i in itertools.count())
    return [_like_filters(v, axes[id(v)], own) for v, own in zip(model.trainable_variables, seeds)]


def _like_filters(variable, axes, seed):
    weights = tf.convert_to_tensor(variable)
    if axes is None:
        return tf.zeros_like(weights)
    noise = tf.random.stateless_normal(weights.shape, seed, dtype=weights.dtype)
    others = [axis for axis in range(weights.shape.rank) if axis not in axes]
    ratio = tf.math.divide_no_nan(_length(weights, others), _length(noise, others))
    return noise * ratio


def _length(a, axes):
    return tf.sqrt(tf.reduce_sum(a * a, axes, keepdims=True))


def filter_axes(model):
    """`{id(variable): axes}` for each trainable variable: those that number its filters; `None` for a bias."""
    axes = {}
    for layer in keras_internals.layers_of(model):
        for variable in keras_internals.own_weights(layer):
            if id(variable) not in axes:
                found = _axes_of(layer, variable)
                axes[id(variable)] = found and tuple(axis % len(variable.shape) for axis in found)
    return axes


def _axes_of(layer, variable):
    if len(variable.shape) < 2 or any(variable is getattr(layer, name, None) for name in _NO_FILTERS):
        return None
    if isinstance(layer, keras.layers.Embedding):
        return (0,)
    if isinstance(layer, keras.layers.EinsumDense):
        left, outputs = layer.equation.replace(" ", "").split("->")
        return tuple(i for i, letter in enumerate(left.split(",")[1]) if letter in outputs)
    if hasattr(layer, "depth_multiplier") and variable is not getattr(layer, "pointwise_kernel", None):
        return (-2, -1)
    transposed = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
    return (-2,) if isinstance(layer, transposed) else (-1,)


# Drawing.


def _draw_plane(figure, ax, axis, name, loss):
    """Contours of the loss above its lowest value, on a logarithmic scale."""
    first, second = name.split(" x ")
    above = np.log10(loss - np.nanmin(loss) + 1e-3 * (np.nanmax(loss) - np.nanmin(loss)) + 1e-30)
    shades = ax.contourf(axis, axis, above.T, levels=20, cmap="Blues")
    figure.colorbar(shades, ax=ax, label="log10 of the loss above the lowest")
    ax.locator_params(nbins=5)
    ax.plot(0, 0, "+", color=RED, markersize=10, label="the weights")
    ax.set(xlabel=f"step, {first}", ylabel=f"step, {second}", title=f"Loss in the plane {name}")
    ax.legend(frameon=False, fontsize="small", loc="upper right")
