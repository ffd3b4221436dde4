"""What is measured in training: pieces of a probe, each a few products with the curvature.

A piece adds numbers by their tags. Pieces run in order and use what those before them have found: the gradient, the
limits of the optimizer, the sharpest direction.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from keras_curvature import trees
from keras_curvature.linearization.fisher import likelihoods
from keras_curvature.monitor.board.axis import Axis
from keras_curvature.monitor.board.layout import BOUNDS, LAYER, LIMITS
from keras_curvature.monitor.noise import noise
from keras_curvature.monitor.spectra import label_traces
from keras_curvature.monitor.stability import Stability, stability

# Products of a Lanczos run from a random vector, and from the one of the probe before: either finds the sharpness to
# about 1e-3, and the second to 1e-2 where training went a long way in between. The smallest eigenvalue takes more: it
# lies close to the many near 0.
COLD, WARM, LOWER = 10, 5, 20
# Relative residual of the sharpness beyond which there are WARM products more.
FAR = 0.05
# Lines of a chart, and the rest in one more.
LAYERS = 8
# Of the noise scale: what one pass over the probe is cut into.
MICRO_BATCHES = 16
# Likewise with batch normalization, whose statistics are then of a micro-batch: large ones are closer to training.
NORMALIZED_BATCHES = 4
# Of the traces of the layers: draws of labels, and, where there are none to draw, products.
DRAWS, PRODUCTS = 2, 5
# The spectral density: one probe is enough for large models, and the steps are what resolves it.
DENSITY_VECTORS, DENSITY_STEPS = 1, 40


class NotFinite(ArithmeticError):
    """The loss or its gradient on the probe is not finite: there is no curvature to measure now."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a probe.

    Attributes:
        name: What it finds, in words.
        ask: The method of `Panels` that finds it.
        products: What it costs, about, until it was timed.
        every: It is part of every so many-th probe.
        needed: Whether nothing else can be asked without it.
    """

    name: str
    ask: Callable
    products: float
    every: int = 1
    needed: bool = False


class Panels:
    """The pieces of a probe, and what one probe leaves to the next.

    Args:
        measured: A `Curvature` of the model on the probe.
        batch_size: Of training, an integer.
    """

    def __init__(self, measured, batch_size):
        self.measured, self.batch_size = measured, batch_size
        self._top = self._bottom = self._preconditioned = self._lines = None
        self._axis = None
        self._samples = measured.objective.kind != "empirical_fisher" and _is_likelihood(measured.objective.model)
        self.pieces = (
            Piece("the gradient", Panels._gradient, 0.5, needed=True),
            Piece("the curvature along the gradient", Panels._along_gradient, 1),
            Piece("the sharpness", Panels._sharpness, WARM),
            Piece("the preconditioned sharpness", Panels._preconditioned_sharpness, 2 * WARM),  # and the metric's
            Piece("the most negative eigenvalue", Panels._most_negative, LOWER, every=5),
            Piece("the noise scale", Panels._noise_scale, 2, every=2),
            Piece("the shares of the layers", Panels._layers, DRAWS if self._samples else PRODUCTS, every=2),
        )

    def begin(self, model):
        """A new probe, at the weights that the model has now."""
        self.values, self.limits, self.model, self.sharpness = {}, {}, model, math.nan
        self.weights = trees.values(self.measured.variables)
        optimizer, none = model.optimizer, Stability(math.nan, reason="The model was compiled without an optimizer.")
        self.stability = stability(optimizer, model.trainable_variables) if optimizer is not None else none

    def again(self):
        """As many products as a warm start takes, once more, for whoever wants to know what they cost."""
        self.measured.extremes(self._top, WARM)

    def add(self, tag, value, limit=None):
        """Note a number, and what it must stay below or above."""
        self.values[tag] = float(value)
        limit = LIMITS.get(tag) if limit is None else limit
        if limit is not None:
            self.limits[tag] = float(limit)

    # The pieces.

    def _gradient(self):
        self.gradient = self.check_finite()
        self._squared = float(trees.squared_norm(self.gradient))
        self.add("3_step/gradient_norm", math.sqrt(self._squared))

    def _along_gradient(self):
        if self._squared == 0.0:
            return
        bent = float(trees.dot(self.gradient, self.measured @ self.gradient))
        self.add("3_step/curvature_along_gradient", bent / self._squared)
        along = self.stability.preconditioner is None and self.stability.reason is None
        if along and 0 < bent < math.inf:
            self.add("3_step/best_rate", self._squared / bent, self.stability.rate)

    def _sharpness(self):
        largest, smallest = self._ends(self._top)
        if self._bottom is None:
            self._bottom = smallest.vectors[0]
        self._top = largest.vectors[0]
        self.sharpness = float(largest.values[0])
        plain = self.stability.preconditioner is None
        self.add("1_stability/sharpness", self.sharpness, self.stability.sharpness_limit if plain else None)
        self.add("1_stability/sharpness_residual", _residual(largest))
        if plain and self.stability.limit is not None:
            self.add("1_stability/gauge", self.stability.gauge(self.sharpness))
        if self._squared:
            self.add("3_step/gradient_in_sharpest", float(trees.dot(self._top, self.gradient)) ** 2 / self._squared)

    def _preconditioned_sharpness(self):
        if self.stability.preconditioner is None:
            return
        largest, _ = self._ends(self._preconditioned, self.stability.preconditioner)
        self._preconditioned = largest.vectors[0]
        found = float(largest.values[0])
        self.add("1_stability/preconditioned_sharpness", found, self.stability.sharpness_limit)
        self.add("1_stability/preconditioned_residual", _residual(largest))
        self.add("1_stability/gauge", self.stability.gauge(found))

    def _ends(self, start, metric=None):
        """The largest and the smallest eigenvalue; the smallest is a rough one."""
        largest, smallest = self.measured.extremes(start, COLD if start is None else WARM, metric)
        if _residual(largest) > FAR:
            largest, _ = self.measured.extremes(largest.vectors[0], WARM, metric)
        return largest, smallest

    def _most_negative(self):
        if self.measured.psd:
            return
        _, smallest = self.measured.extremes(self._bottom, LOWER)
        self._bottom = smallest.vectors[0]
        self.add("1_stability/most_negative", smallest.values[0])
        self.add("1_stability/most_negative_residual", _residual(smallest))

    def _noise_scale(self):
        objective = self.measured.objective
        parts = NORMALIZED_BATCHES if objective.mixes_examples else MICRO_BATCHES
        micro_batch = max(1, objective.batch_size // parts)
        # No average over measurements: the examples, and so their error, are the same every time; and where the
        # gradient shrinks, an average would be dominated by old values.
        found = noise.noise(objective, micro_batch, parts=8, curvature=False)
        scale = found.simple
        if not 0 < scale < math.inf:  # the gradient is lost in the noise
            return
        self.add("2_noise/noise_scale", scale, self.batch_size)
        self.add("2_noise/gauge", self.batch_size / scale)
        error = min(found.stderr["simple"], 9 * scale)  # nor is it ever a number where the signal may be 0
        error = error if math.isfinite(error) else 9 * scale
        for tag, bound in zip(BOUNDS, (max(scale - error, 0.0), scale + error)):
            self.add(tag, bound, self.batch_size)  # a chart with bounds is drawn of runs that have all three

    def _layers(self):
        found, stderr = self._traces()
        whole = sum(found.values())
        self.add("6_layers/trace", whole)
        self.add("6_layers/trace_stderr", stderr)
        if self.sharpness > 0:
            self.add("6_layers/effective_directions", whole / self.sharpness)
        if whole <= 0:
            return
        if self._lines is None:  # the same layers all the time, for lines without gaps
            self._lines = sorted(found, key=found.get, reverse=True)[:LAYERS]
        for name in self._lines:
            self.add(LAYER + name, found[name] / whole)
        if len(found) > len(self._lines):
            self.add(LAYER + "others", 1.0 - sum(found[name] for name in self._lines) / whole)

    def _traces(self):
        """`{layer: trace}`, by labels drawn from the model, where its loss is a likelihood, and else by products.

        And a standard error of their sum; of products, whose errors go together, at most.
        """
        if self._samples:
            traces = label_traces.layer_traces(self.measured.objective, draws=DRAWS)
            return {name: traces.of(own)[0] for name, own in self.measured.layers.items()}, traces.of()[1]
        found = self.measured.trace(PRODUCTS, by_layer=True)
        return {name: each.value for name, each in found.items()}, sum(each.stderr for each in found.values())

    # What is asked at other times.

    def check_finite(self):
        """The gradient on the probe.

        Raises:
            NotFinite: It is not.
        """
        gradient = self.measured.gradient
        if not bool(trees.is_finite(gradient)):
            raise NotFinite("the weights, or the gradient of the loss on the probe, are not finite")
        return gradient

    def update(self, before, gradient):
        """`{tag: number}` of the step from the weights `before` to those that the model has now."""
        self.values, self.limits = {}, {}
        weights = trees.values(self.measured.variables)
        step = trees.subtract(weights, before)
        length, slope = float(trees.norm(step)), float(trees.dot(step, gradient))
        self._moved = weights, step
        self.add("3_step/update_norm", length)
        if length and float(trees.norm(gradient)):
            self.add("3_step/cosine", -slope / (length * float(trees.norm(gradient))))
        ratios = [self._ratio(step, before, own) for own in self.measured.layers.values()]
        ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
        if ratios:
            self.add("3_step/update_to_weight_max", max(ratios))
            self.add("3_step/update_to_weight_median", float(np.median(ratios)))
        return self.values

    def bounce(self):
        """`{tag: number}` of the step after that of `update`, to the weights that the model has now."""
        (before, last), self._moved = self._moved, None
        step = trees.subtract(trees.values(self.measured.variables), before)
        length = float(trees.norm(step)) * float(trees.norm(last))
        return {"3_step/cosine_of_updates": float(trees.dot(step, last)) / length} if length else {}

    def _ratio(self, step, weights, indices):
        """How far the step moves a layer, in lengths of its weights; infinite where these are 0."""
        step, weights = (float(trees.norm([v[i] for i in indices])) for v in (step, weights))
        return step / weights if weights else math.inf

    def density(self):
        """The spectral density, `Density`."""
        return self.measured.density(DENSITY_VECTORS, DENSITY_STEPS)

    def bars(self, density):
        """`(bins, 3)`: left, right and height of the bars of a histogram; see `axis`."""
        if self._axis is None:
            self._axis = Axis.of(density)
        return self._axis.bars(density, trees.count(self.weights))

    @property
    def axis(self):
        """The `Axis` of all the histograms."""
        return self._axis


def _residual(pairs):
    """The residual of the first of `Eigenpairs` over its eigenvalue."""
    value = abs(float(pairs.values[0]))
    return float(pairs.residuals[0]) / value if value else math.inf


def _is_likelihood(model):
    """Whether labels can be drawn for all of a model's losses."""
    return model.loss is not None and likelihoods.unknown(model) is None
