"""The questions of a report, how much each may cost, and the answers as plain numbers."""

import dataclasses
import math
import time

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.curvature.convexity import name_of
from keras_curvature.curvature.noise import noise
from keras_curvature.landscape import downhill, filter_normalized, slices
from keras_curvature.models import unwrap
from keras_curvature.operators import Function
from keras_curvature.optimizers.stability import stability
from keras_curvature.solvers import lanczos, traces

# Eigenvalues to find, and how many beyond the classes of a classifier, to see the gap behind the last of them.
TOP, BEYOND, MOST_CLASSES = 10, 3, 20
# Residuals relative to the eigenvalue; of the lower end, where eigenvalues lie close, less is asked for.
TOLERANCE, LOWER_TOLERANCE = 1e-3, 3e-2
# Products at most for each end; the residual says what they came to.
MOST_PRODUCTS = 100
# The density is that of the operator without the pairs found: few probes do, and steps resolve the bulk.
DENSITY_PROBES, DENSITY_STEPS = 3, 20
TRACE_PRODUCTS = 20
# A product by the block of a layer costs as much as one by the whole matrix: so many for all layers together, each
# from where the sharpest direction is in it; of a model of many layers, for those with the largest shares.
BLOCK_PRODUCTS, FEWEST_STEPS, MOST_STEPS = 60, 5, 6
POINTS = 41
MICRO_BATCH, FEWEST_EXAMPLES = 8, 4  # for micro-batches of 8, batches of 32
ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
CLASSIFIERS = {
    "SparseCategoricalCrossentropy", "sparse_categorical_crossentropy",
    "CategoricalCrossentropy", "categorical_crossentropy",
}  # fmt: skip


def measure(measured, seed=0):
    """The dict of a `Report`.

    Args:
        measured: A `Curvature` of all layers, as `keras_curvature.curvature` makes it.
        seed: Of the random probes, an integer. Defaults to `0`.
    """
    asked, began = _Asked(measured, seed), time.perf_counter()
    answers = _header(measured)
    for name, question in QUESTIONS.items():
        before, start = asked.products, time.perf_counter()
        answers |= question(asked)
        asked.parts[name] = {"products": asked.products - before, "seconds": time.perf_counter() - start}
    answers["caveats"] = list(_caveats(measured, answers))
    seconds = time.perf_counter() - began
    answers["cost"] = {"products": asked.products, "seconds": seconds, "parts": asked.parts}
    return answers


@dataclasses.dataclass
class _Asked:
    """What the questions share: each adds to `products`, and the later ones use what the earlier ones found."""

    measured: object
    seed: int
    products: int = 0
    parts: dict = dataclasses.field(default_factory=dict)
    gradient: list = None
    top: object = None
    found: object = None  # eigenvalues and vectors of both ends
    trace: object = None
    layers: dict = None

    @property
    def probes(self):
        return self.measured.probes

    @property
    def rounding(self):
        """Of the least precise layer's numbers."""
        layers = [layer for layer in self.probes.model._flatten_layers() if layer._trainable_variables]
        return max((ROUNDING.get(layer.compute_dtype, 2.0**-23) for layer in layers), default=2.0**-23)

    @property
    def size(self):
        return trees.count(self.measured.variables)

    def pairs(self, k, tolerance, **options):
        """`Eigenpairs` of the model's curvature."""
        like = self.probes.weights
        pairs = lanczos.eigenpairs(
            self.measured, like, k, tolerance, seed=self.seed, max_products=MOST_PRODUCTS, **options
        )
        self.products += pairs.products
        return pairs


def _header(measured):
    probes, model = measured.probes, measured.probes.model
    return {
        "model": model.name, "weights": trees.count(measured.variables), "examples": probes.examples,
        "kind": probes.kind, "training": probes.training, "batch_size": probes.batch_size,
        "dtype": "+".join(_dtypes(model)),
    }  # fmt: skip


def _dtypes(model):
    """The dtype policies of the layers with weights, by name."""
    names = [layer.dtype_policy.name for layer in model._flatten_layers() if layer._trainable_variables]
    return dict.fromkeys(names or [model.dtype])


# The questions, in this order.


def _slope(asked):
    """The loss, and the gradient's length with the standard error that the choice of examples gives it."""
    asked.gradient = asked.measured.gradient
    return {"loss": float(asked.measured.loss)}


def _upper(asked):
    asked.top = top = asked.pairs(min(_wanted(asked), asked.size), TOLERANCE)
    asked.found = [(value, vector) for value, vector in zip(top.values, top.vectors)]
    pairs = [_pair(top, i, asked.rounding) for i in range(len(top.values))]
    return {"sharpness": pairs[0], "top": pairs, "outliers": _outliers(asked.probes.model)}


def _wanted(asked):
    outliers = _outliers(asked.probes.model)
    return TOP if outliers is None else outliers + BEYOND


def _outliers(model):
    """Classes - 1 of a classifier with one output for each example; `None` where that says nothing."""
    shape = getattr(model, "output_shape", None)
    loss = getattr(model, "loss", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or isinstance(loss, (list, dict)):
        return None
    return shape[1] - 1 if name_of(loss) in CLASSIFIERS and 2 <= shape[1] <= MOST_CLASSES else None


def _lower(asked):
    if asked.measured.psd:
        return {"most_negative": None}
    pairs = asked.pairs(1, LOWER_TOLERANCE, most_negative=True)
    if pairs.values[0] < min(value for value, _ in asked.found):  # of a small model all have been found
        asked.found.append((pairs.values[0], pairs.vectors[0]))
    return {"most_negative": _pair(pairs, 0, asked.rounding)}


def _stability(asked):
    """How near the optimizer's limit is, and the sharpness that it is on."""
    optimizer = unwrap(getattr(asked.probes.model, "optimizer", None))[0]
    if optimizer is None:
        return {"stability": _no_limit(None, "The model has no optimizer, and so no limit for its sharpness.")}
    name, limit = type(optimizer).__name__, stability(optimizer, asked.measured.variables)
    if limit.limit is None:
        return {"stability": _no_limit(name, limit.reason)}
    sharpness, pair = float(asked.top.values[0]), None
    if limit.preconditioner is not None:
        pairs = asked.pairs(1, TOLERANCE, metric=limit.preconditioner)
        sharpness, pair = float(pairs.values[0]), _pair(pairs, 0, asked.rounding)
    known = {"rate": limit.rate, "limit": limit.sharpness_limit, "formula": limit.formula, "note": limit.note}
    found = {"gauge": float(limit.gauge(sharpness)), "sharpness": pair}
    return {"stability": _no_limit(name, None) | known | found}


def _no_limit(name, reason):
    nothing = dict.fromkeys(("rate", "limit", "formula", "note", "gauge", "sharpness"))
    return {"optimizer": name, **nothing, "reason": reason}


def _density(asked):
    """Quadrature of the operator without the pairs found: nodes and weights, and how much of it is negative."""
    rest, like = without(asked.measured, asked.found), asked.probes.weights
    starts = [_start(like, asked.seed, probe) for probe in range(DENSITY_PROBES)]
    runs = [lanczos.tridiagonalize(rest, start, DENSITY_STEPS, basis=False) for start in starts]
    asked.products += sum(run.products for run in runs)
    nodes, weights = zip(*(quadrature(run, DENSITY_STEPS) for run in runs))
    known = [value for value, _ in asked.found]
    share = None if asked.measured.psd else negative_share(runs, known, asked.size)
    return {"density": {"nodes": _list(nodes), "weights": _list(weights)}, "negative_share": share}


def _start(like, seed, probe):
    """A random vector."""
    return [
        tf.random.stateless_normal(a.shape, [seed, len(like) * probe + i], dtype=a.dtype) for i, a in enumerate(like)
    ]


def quadrature(run, steps):
    """`(nodes, weights)` of the first steps of a Lanczos run: `v'f(A)v ~ sum_i weights_i f(nodes_i)`, `|v| = 1`.

    Of a run that ended early the nodes are fewer, and those that are added have no weight.
    """
    block = run.matrix[:steps, :steps]
    nodes, vectors = np.linalg.eigh(block)
    missing = steps - len(nodes)
    return np.pad(nodes, (0, missing), mode="edge"), np.pad(vectors[0] ** 2, (0, missing))


def without(operator, found):
    """`A - sum_i theta_i u_i u_i'` for pairs `(theta, u)`, an operator."""
    values = [float(value) for value, _ in found]
    stacked = [tf.stack(parts) for parts in zip(*(vector for _, vector in found))]

    @tf.function(autograph=False)
    def subtract(product, vector):
        dtype = trees.scalar_dtype(vector)
        along = tf.add_n([
            tf.reduce_sum(tf.cast(u * a, dtype), list(range(1, u.shape.rank))) for u, a in zip(stacked, vector)
        ])  # fmt: skip
        scaled = along * tf.constant(values, dtype)
        return [
            a - tf.reduce_sum(tf.reshape(tf.cast(scaled, u.dtype), [-1] + [1] * (u.shape.rank - 1)) * u, 0)
            for a, u in zip(product, stacked)
        ]

    return Function(lambda vector: subtract(operator @ vector, list(vector)))


def negative_share(runs, known, size):
    """The share of `sum |lambda|` that is below zero: of known eigenvalues, and of the rest by Lanczos runs.

        (sum_known lambda^- + n mean_p N_p) / (sum_known |lambda| + n mean_p A_p)

    with `N_p`, `A_p` the quadratures of `lambda^-` and `|lambda|` of run `p`. Most eigenvalues of a network are near
    zero, where `|lambda|` has its kink: quadratures of an even and an odd number of steps lie to both sides of it. So
    these are means over all numbers of steps from half of them on, and their spread is part of the error, beside the
    jackknife's over the runs.

    Args:
        runs: `Tridiagonal` records of random starts.
        known: Eigenvalues that are zero in their operator.
        size: `n`.
    """
    most = max(len(run.alpha) for run in runs)
    below, whole = (np.array(a) for a in zip(*(_sums(runs, steps) for steps in range(max(1, most // 2), most + 1))))
    known = np.asarray(known, np.float64)
    lost, total = np.maximum(-known, 0).sum(), np.abs(known).sum()

    def share(chosen):  # for each number of steps
        parts = lost + size * below[:, chosen].mean(1), total + size * whole[:, chosen].mean(1)
        return np.divide(*parts, out=np.zeros(len(below)), where=parts[1] > 0)

    probes = np.arange(len(runs))
    left_out = [share(np.delete(probes, i)).mean() for i in probes] if len(probes) > 1 else [math.nan]
    found = share(probes)
    error = math.hypot(math.sqrt((len(probes) - 1) * np.var(left_out)), np.std(found))
    return {"value": float(found.mean()), "stderr": error}


def _sums(runs, steps):
    """The quadratures of `lambda^-` and `|lambda|` of each run; one that ended before is exact at its end."""
    pairs = [quadrature(run, steps if len(run.alpha) >= steps and not _ended(run) else len(run.alpha)) for run in runs]
    sums = [(np.sum(w * np.maximum(-nodes, 0)), np.sum(w * np.abs(nodes))) for nodes, w in pairs]
    return tuple(zip(*sums))


def _ended(run):
    return len(run.alpha) < DENSITY_STEPS or run.beta[-1] <= 1e-6 * np.abs(run.alpha).max()


def _trace(asked):
    """The trace without the pairs found, which are exact, by random probes; the same probes give the layers' parts."""
    pairs = dataclasses.replace(
        asked.top, values=np.array([value for value, _ in asked.found]), vectors=[vector for _, vector in asked.found]
    )
    found = traces.deflated(
        asked.measured, asked.probes.weights, pairs, TRACE_PRODUCTS, asked.seed, parts=asked.measured.layers
    )
    asked.trace, parts = found
    asked.products += asked.trace.products
    whole = sum(abs(float(part.value)) for part in parts.values())
    asked.layers = {name: _layer(asked, name, part, whole) for name, part in parts.items()}
    sharpness = float(asked.top.values[0])
    positive = sharpness > 0
    directions = {key: value / sharpness for key, value in _estimate(asked.trace).items()} if positive else None
    return {"trace": _estimate(asked.trace), "effective_directions": directions}


def _layer(asked, name, trace, whole):
    weights = sum(int(np.prod(asked.measured.variables[i].shape)) for i in asked.measured.layers[name])
    value = float(trace.value)
    share, each = value / whole if whole else 0.0, value / weights
    return {"weights": weights, "trace": _estimate(trace), "share": share, "sharpness": None, "per_weight": each}


def _blocks(asked):
    """The sharpness of the layers' blocks, each from where the sharpest direction of all is in it."""
    steps = min(MOST_STEPS, max(FEWEST_STEPS, BLOCK_PRODUCTS // len(asked.layers)))
    ordered = sorted(asked.layers, key=lambda name: -abs(asked.layers[name]["share"]))
    for name in ordered[: BLOCK_PRODUCTS // steps]:
        start = [asked.found[0][1][i] for i in asked.measured.layers[name]]
        pairs = asked.measured.block(name).sharpness(start if _norm(start) > 0 else None, steps)
        asked.products += pairs.products
        asked.layers[name]["sharpness"] = _pair(pairs, 0, asked.rounding)
    return {"layers": asked.layers}


def _noise(asked):
    """The noise scale; and the gradient with the error that the choice of examples gives it."""
    length = _norm(asked.gradient)
    cosine = abs(float(trees.dot(asked.gradient, asked.found[0][1]))) / length if length else 0.0
    gradient = {"norm": length, "stderr": None, "cosine": cosine}
    probes = asked.probes
    uneven = of_sums(probes.model) and len(set(probes.counts)) > 1  # each batch on a scale of its own
    if uneven or min(probes.counts) < FEWEST_EXAMPLES:
        return {"gradient": gradient, "noise": None}
    found = noise(probes, min(MICRO_BATCH, min(probes.counts) // FEWEST_EXAMPLES))
    asked.products += found.products
    gradient["stderr"] = math.sqrt(max(found.noise, 0.0) / probes.examples)
    scales = {name: _scale(found, name) for name in ("simple", "with_curvature")}
    return {"gradient": gradient, "noise": scales}


def of_sums(model):
    """Whether the compiled loss adds up the examples of a batch."""
    return any(getattr(loss, "reduction", None) == "sum" for loss in keras.tree.flatten(getattr(model, "loss", None)))


def _scale(noise, name):
    return {"value": float(getattr(noise, name)), "stderr": float(noise.stderr[name])}


def _landscape(asked):
    sharpest = downhill(asked.found[0][1], asked.gradient)
    lines = {"sharpest": sharpest, "random": filter_normalized(asked.probes.model, asked.seed)}
    drawn = slices(asked.measured, lines, [(name,) for name in lines], POINTS)
    asked.products += len(lines)
    losses, models = ({name: _list(v) for name, v in values.items()} for values in (drawn.loss, drawn.quadratic))
    return {"landscape": {"axis": _list(drawn.axis), "loss": losses, "quadratic": models}}


QUESTIONS = {
    "gradient": _slope, "top": _upper, "bottom": _lower, "stability": _stability, "density": _density,
    "trace": _trace, "layers": _blocks, "noise": _noise, "landscape": _landscape,
}  # fmt: skip


# What the numbers do not say by themselves.


def _caveats(measured, answers):
    yield (
        "Sharpness is no property of the function: ReLU layers multiplied and divided by 10 compute the same and have "
        "another one. Compare it with the learning rate, not with other models."
    )
    probes, model = measured.probes, measured.probes.model
    normalized = any(isinstance(layer, keras.layers.BatchNormalization) for layer in model._flatten_layers())
    if probes.training:
        yield f"Train mode: the numbers belong to batches of {probes.batch_size}; other batches, other numbers."
    elif normalized:
        yield "Batch normalization uses its moving statistics here; what a step of training meets is `training=True`."
    if of_sums(model):
        yield "The loss is a sum over the examples of a batch: all numbers grow with the batch."
    optimizer = unwrap(getattr(model, "optimizer", None))[0]
    if getattr(optimizer, "weight_decay", None):
        yield f"The weight decay of {optimizer.weight_decay:g} is no part of the loss, and is not in these numbers."
    stable = answers["stability"]
    yield from (sentence for sentence in (stable["reason"], stable["note"]) if sentence)
    if stable["limit"] is not None and probes.kind != "hessian":
        yield f"The limit is on the Hessian; `kind={probes.kind!r}` stands in for it."


# Plain numbers.


def _pair(pairs, i, rounding):
    """One eigenvalue; `rounding`: of the products, below which a residual says nothing."""
    least = rounding * np.abs(pairs.values).max()
    return {"value": float(pairs.values[i]), "residual": float(max(pairs.residuals[i], least))}


def _estimate(estimate):
    return {"value": float(estimate.value), "stderr": float(estimate.stderr)}


def _norm(vector):
    return float(trees.norm(vector))


def _list(array):
    return np.asarray(array, np.float64).tolist()
