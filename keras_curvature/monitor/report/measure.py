"""The questions of a report, the cost of each, and the answers as plain numbers."""

import dataclasses
import math
import time

import keras
import numpy as np

from keras_curvature import keras_internals, trees
from keras_curvature.linearization.fisher.convexity import name_of
from keras_curvature.monitor.objective.objective import mixes_examples
from keras_curvature.monitor.report.landscape import downhill, filter_normalized, slices
from keras_curvature.monitor.spectra import traces
from keras_curvature.monitor.stability import stability
from keras_curvature.training.step import unwrap

# Number of eigenvalues; for a classifier, classes - 1 and BEYOND more, to see the gap behind them.
TOP, BEYOND, MOST_CLASSES = 10, 3, 20
# Relative residuals; the tolerance is looser at the lower end, where eigenvalues lie close.
TOLERANCE, LOWER_TOLERANCE = 1e-3, 3e-2
# Most products for each end; the residual tells the accuracy reached.
MOST_PRODUCTS = 100
# The density is estimated beside the pairs found: few random vectors suffice, and the steps resolve the bulk.
DENSITY_VECTORS, DENSITY_STEPS = 3, 20
TRACE_PRODUCTS = 20
# A block product costs a full product, so this budget is shared by the layers with the largest shares. Each layer
# starts from its part of the sharpest direction.
BLOCK_PRODUCTS, FEWEST_STEPS, MOST_STEPS = 60, 5, 6
POINTS = 41
MICRO_BATCH, FEWEST_EXAMPLES = 8, 4  # for micro-batches of 8, batches of 32
CLASSIFIERS = {
    "SparseCategoricalCrossentropy", "sparse_categorical_crossentropy",
    "CategoricalCrossentropy", "categorical_crossentropy",
}  # fmt: skip


def measure(measured, progress=False):
    """The dict of a `Report`.

    Args:
        measured: A `Curvature` of all layers.
        progress: Whether to show a progress bar. Defaults to `False`.
    """
    asked, began = _Asked(measured), time.perf_counter()
    answers, bar = _header(measured), keras.utils.Progbar(len(QUESTIONS), verbose=int(progress), unit_name="part")
    for done, (name, question) in enumerate(QUESTIONS.items(), start=1):
        before, start = asked.products, time.perf_counter()
        answers |= question(asked)
        asked.parts[name] = {"products": asked.products - before, "seconds": time.perf_counter() - start}
        bar.update(done)
    answers["caveats"] = list(_caveats(measured, answers))
    seconds = time.perf_counter() - began
    answers["cost"] = {"products": asked.products, "seconds": seconds, "parts": asked.parts}
    return answers


@dataclasses.dataclass
class _Asked:
    """The state that the questions share: each adds to `products`, and later questions use earlier results."""

    measured: object
    products: int = 0
    parts: dict = dataclasses.field(default_factory=dict)
    gradient: list | None = None
    top: object = None
    known: object = None  # `Eigenpairs` of both ends
    layers: dict | None = None

    @property
    def objective(self):
        return self.measured.objective

    @property
    def size(self):
        return trees.count(self.measured.variables)

    def pairs(self, k, tolerance, **options):
        """`Eigenpairs` of the model's curvature."""
        pairs = self.measured.top(k, tolerance, max_products=MOST_PRODUCTS, **options)
        self.products += pairs.products
        return pairs


def _header(measured):
    objective, model = measured.objective, measured.objective.model
    return {
        "model": model.name, "weights": trees.count(measured.variables), "examples": objective.examples,
        "kind": objective.kind, "training": objective.training, "batch_size": objective.batch_size,
        "dtype": "+".join(_dtypes(model)),
    }  # fmt: skip


def _dtypes(model):
    """The dtype policies of the layers with weights, by name."""
    layers = [layer for layer in keras_internals.layers_of(model) if keras_internals.own_weights(layer)]
    names = [layer.dtype_policy.name for layer in layers]
    return dict.fromkeys(names or [model.dtype])


# The questions, in this order.


def _slope(asked):
    """The loss; the gradient is kept for later questions."""
    asked.gradient = asked.measured.gradient
    return {"loss": float(asked.measured.loss)}


def _upper(asked):
    asked.top = asked.known = top = asked.pairs(min(_wanted(asked), asked.size), TOLERANCE)
    pairs = [_pair(top, i) for i in range(len(top.values))]
    return {"sharpness": pairs[0], "top": pairs, "outliers": _outliers(asked.objective.model)}


def _wanted(asked):
    outliers = _outliers(asked.objective.model)
    return TOP if outliers is None else outliers + BEYOND


def _outliers(model):
    """Classes - 1 for a classifier with one output per example; else `None`."""
    shape = getattr(model, "output_shape", None)
    loss = getattr(model, "loss", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or isinstance(loss, (list, dict)):
        return None
    return shape[1] - 1 if name_of(loss) in CLASSIFIERS and 2 <= shape[1] <= MOST_CLASSES else None


def _lower(asked):
    if asked.measured.psd:
        return {"most_negative": None}
    pairs = asked.pairs(1, LOWER_TOLERANCE, most_negative=True)
    if pairs.values[0] < asked.top.values[-1]:  # in a small model it may be among the pairs found
        asked.known = asked.top.beside(pairs)
    return {"most_negative": _pair(pairs, 0)}


def _stability(asked):
    """The optimizer's limit, and the sharpness that it refers to."""
    optimizer = unwrap(getattr(asked.objective.model, "optimizer", None))[0]
    if optimizer is None:
        return {"stability": _no_limit(None, "The model has no optimizer, and so no limit for its sharpness.")}
    name, limit = type(optimizer).__name__, stability(optimizer, asked.measured.variables)
    if limit.limit is None:
        return {"stability": _no_limit(name, limit.reason)}
    sharpness, pair = float(asked.top.values[0]), None
    if limit.preconditioner is not None:
        pairs = asked.pairs(1, TOLERANCE, metric=limit.preconditioner)
        sharpness, pair = float(pairs.values[0]), _pair(pairs, 0)
    other = mixes_examples(asked.objective.model) and not asked.objective.training
    known = {"rate": limit.rate, "limit": limit.sharpness_limit, "formula": limit.formula, "note": limit.note}
    found = {"of_training": not other, "gauge": float(limit.gauge(sharpness)), "sharpness": pair}
    return {"stability": _no_limit(name, None) | known | found}


def _no_limit(name, reason):
    nothing = dict.fromkeys(("of_training", "rate", "limit", "formula", "note", "gauge", "sharpness"))
    return {"optimizer": name, **nothing, "reason": reason}


def _density(asked):
    """Nodes and weights of the whole spectrum, with the pairs found taken as known, and its negative share."""
    found = asked.measured.density(DENSITY_VECTORS, DENSITY_STEPS, asked.known)
    asked.products += found.products
    share = None if asked.measured.psd else _estimate(found.negative)
    return {"density": {"nodes": _list(found.nodes), "weights": _list(found.weights)}, "negative_share": share}


def _trace(asked):
    """The trace without the pairs found, which are exact, by random vectors; the same give the layers' parts."""
    like, layers = asked.objective.weights, asked.measured.layers
    trace, parts = traces.trace(asked.measured, like, TRACE_PRODUCTS, asked.objective.seed, asked.known, layers)
    asked.products += trace.products
    whole = sum(abs(float(part.value)) for part in parts.values())
    asked.layers = {name: _layer(asked, name, part, whole) for name, part in parts.items()}
    sharpness = float(asked.top.values[0])
    positive = sharpness > 0
    directions = {key: value / sharpness for key, value in _estimate(trace).items()} if positive else None
    return {"trace": _estimate(trace), "effective_directions": directions}


def _layer(asked, name, trace, whole):
    weights = trees.count([asked.measured.variables[i] for i in asked.measured.layers[name]])
    value = float(trace.value)
    share, each = value / whole if whole else 0.0, value / weights
    return {"weights": weights, "trace": _estimate(trace), "share": share, "sharpness": None, "per_weight": each}


def _blocks(asked):
    """The sharpness of the layers' blocks, each started from its part of the sharpest direction."""
    steps = min(MOST_STEPS, max(FEWEST_STEPS, BLOCK_PRODUCTS // len(asked.layers)))
    ordered = sorted(asked.layers, key=lambda name: -abs(asked.layers[name]["share"]))
    for name in ordered[: BLOCK_PRODUCTS // steps]:
        start = [asked.top.vectors[0][i] for i in asked.measured.layers[name]]
        pairs = asked.measured.block(name).sharpness(start if _norm(start) > 0 else None, steps)
        asked.products += pairs.products
        asked.layers[name]["sharpness"] = _pair(pairs, 0)
    return {"layers": asked.layers}


def _noise(asked):
    """The noise scale, and the gradient with its standard error from the choice of examples."""
    length = _norm(asked.gradient)
    cosine = abs(float(trees.dot(asked.gradient, asked.top.vectors[0]))) / length if length else 0.0
    gradient = {"norm": length, "stderr": None, "cosine": cosine}
    objective = asked.objective
    if min(objective.counts) < FEWEST_EXAMPLES:
        return {"gradient": gradient, "noise": None}
    found = asked.measured.noise(min(MICRO_BATCH, min(objective.counts) // FEWEST_EXAMPLES))
    asked.products += found.products
    gradient["stderr"] = math.sqrt(max(found.noise, 0.0) / objective.examples)
    scales = {name: _scale(found, name) for name in ("simple", "with_curvature")}
    return {"gradient": gradient, "noise": scales}


def _scale(noise, name):
    return {"value": float(getattr(noise, name)), "stderr": float(noise.stderr[name])}


def _landscape(asked):
    sharpest = downhill(asked.top.vectors[0], asked.gradient)
    lines = {"sharpest": sharpest, "random": filter_normalized(asked.objective.model, asked.objective.seed)}
    if not _norm(lines["random"]):  # no filter that it could move
        del lines["random"]
    drawn = slices(asked.measured, lines, [(name,) for name in lines], POINTS)
    asked.products += len(lines)
    losses, models = ({name: _list(v) for name, v in values.items()} for values in (drawn.loss, drawn.quadratic))
    return {"landscape": {"axis": _list(drawn.axis), "loss": losses, "quadratic": models}}


QUESTIONS = {
    "gradient": _slope, "top": _upper, "bottom": _lower, "stability": _stability, "density": _density,
    "trace": _trace, "layers": _blocks, "noise": _noise, "landscape": _landscape,
}  # fmt: skip


# What a reader must know beside the numbers.


def _caveats(measured, answers):
    yield (
        "Sharpness is not a property of the function: multiplying one ReLU layer by 10 and dividing the next by 10 "
        "leaves the function and changes the sharpness. Compare it with the learning rate, not with other models."
    )
    objective, model = measured.objective, measured.objective.model
    if objective.training:
        yield f"Train mode: the numbers belong to batches of {objective.batch_size}; other batch sizes change them."
    elif mixes_examples(model):
        yield (
            "Batch normalization uses its moving statistics here, so the numbers tell how flat the trained function "
            "is. `training=True` measures what training steps see, which the limit refers to."
        )
    if objective.is_sum:
        yield "The loss is a sum over the examples of a batch, so all numbers grow with the batch."
    optimizer = unwrap(getattr(model, "optimizer", None))[0]
    if getattr(optimizer, "weight_decay", None):
        yield f"The weight decay of {optimizer.weight_decay:g} is not part of the loss, nor of these numbers."
    stable = answers["stability"]
    yield from (sentence for sentence in (stable["reason"], stable["note"]) if sentence)
    if stable["limit"] is not None and objective.kind != "hessian":
        yield f"The limit refers to the Hessian; `kind={objective.kind!r}` stands in for it."


# Plain numbers.


def _pair(pairs, i):
    return {"value": float(pairs.values[i]), "residual": float(pairs.residuals[i])}


def _estimate(estimate):
    return {"value": float(estimate.value), "stderr": float(estimate.stderr)}


def _norm(vector):
    return float(trees.norm(vector))


def _list(array):
    return np.asarray(array, np.float64).tolist()
