"""The measurements of the board, in pieces of a few curvature products each.

A piece adds numbers by their tags. Pieces run in order and use earlier results: the gradient, the limits of the
optimizer, the sharpest direction.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from keras_curvature import trees
from keras_curvature.linearization.fisher import of_losses
from keras_curvature.monitor.board.axis import Axis
from keras_curvature.monitor.board.failures import NotFinite
from keras_curvature.monitor.board.layout import BOUNDS, LAYER, LIMITS
from keras_curvature.monitor.noise import noise
from keras_curvature.monitor.spectra import label_traces
from keras_curvature.monitor.stability import Stability, stability

# Products of a Lanczos run from a random vector, and from the last measurement's eigenvector. Either finds the
# sharpness to about 1e-3; the second to 1e-2 where training went far in between. The smallest eigenvalue takes more
# products, because it lies close to many eigenvalues near 0.
COLD, WARM, LOWER = 10, 5, 20
# Relative residual of the sharpness above which WARM more products follow.
FAR = 0.05
# Lines in a chart of layers; one more line has the rest.
LAYERS = 8
# For the noise scale one pass over the examples is cut into so many micro-batches.
MICRO_BATCHES = 16
# With batch normalization the statistics are those of a micro-batch, and large ones are closer to training.
NORMALIZED_BATCHES = 4
# For the traces of the layers: draws of labels, or products where labels cannot be drawn.
DRAWS, PRODUCTS = 2, 5
# For the spectral density: one random vector is enough for large models, and the steps set the resolution.
DENSITY_VECTORS, DENSITY_STEPS = 1, 40


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a measurement.

    Attributes:
        name: What it measures, in words.
        ask: The method of `Panels` that measures it.
        products: Its expected cost in products, until it was timed.
        every: It runs in every so many-th measurement.
        needed: Whether the other pieces need its result.
    """

    name: str
    ask: Callable
    products: float
    every: int = 1
    needed: bool = False


class Panels:
    """The pieces of a measurement, and what one measurement leaves to the next.

    Args:
        measured: A `Curvature` of the model.
        batch_size: The batch size of training, an integer.
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
        """Begin a measurement at the model's current weights."""
        self.values, self.limits, self.model, self.sharpness = {}, {}, model, math.nan
        self.weights = trees.values(self.measured.variables)
        optimizer, none = model.optimizer, Stability(math.nan, reason="The model was compiled without an optimizer.")
        self.stability = stability(optimizer, model.trainable_variables) if optimizer is not None else none

    def again(self):
        """Repeat the products of a warm start, to time them."""
        self.measured.extremes(self._top, WARM)

    def add(self, tag, value, limit=None):
        """Note a number and its limit."""
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
        """The largest and the smallest eigenvalue; the smallest is rough."""
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
        if not 0 < scale < math.inf:  # the noise hides the gradient
            return
        self.add("2_noise/noise_scale", scale, self.batch_size)
        self.add("2_noise/gauge", self.batch_size / scale)
        error = min(found.stderr["simple"], 9 * scale)  # the jackknife gives NaN where the signal may be 0
        error = error if math.isfinite(error) else 9 * scale
        for tag, bound in zip(BOUNDS, (max(scale - error, 0.0), scale + error)):
            self.add(tag, bound, self.batch_size)  # TensorBoard draws a chart with bounds where a run has all three

    def _layers(self):
        found, stderr = self._traces()
        whole = sum(found.values())
        self.add("6_layers/trace", whole)
        self.add("6_layers/trace_stderr", stderr)
        if self.sharpness > 0:
            self.add("6_layers/effective_directions", whole / self.sharpness)
        if whole <= 0:
            return
        if self._lines is None:  # the same layers every time, for lines without gaps
            self._lines = sorted(found, key=found.get, reverse=True)[:LAYERS]
        for name in self._lines:
            self.add(LAYER + name, found[name] / whole)
        if len(found) > len(self._lines):
            self.add(LAYER + "others", 1.0 - sum(found[name] for name in self._lines) / whole)

    def _traces(self):
        """`({layer: trace}, stderr)`, from drawn labels where the loss is a likelihood, else from products.

        The standard error is that of the sum of the traces; from products, an upper bound.
        """
        if self._samples:
            traces = label_traces.layer_traces(self.measured.objective, draws=DRAWS)
            return {name: traces.of(own)[0] for name, own in self.measured.layers.items()}, traces.of()[1]
        found = self.measured.trace(PRODUCTS, by_layer=True)
        return {name: each.value for name, each in found.items()}, sum(each.stderr for each in found.values())

    # Between measurements.

    def check_finite(self):
        """The gradient.

        Raises:
            NotFinite: The gradient is not finite.
        """
        gradient = self.measured.gradient
        if not bool(trees.is_finite(gradient)):
            raise NotFinite("the weights, or the gradient of the loss on the measured examples, are not finite")
        return gradient

    def update(self, before, gradient):
        """`{tag: number}` for the step from the weights `before` to the model's current weights."""
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
        """`{tag: number}` for the step that follows the one of `update`, to the model's current weights."""
        (before, last), self._moved = self._moved, None
        step = trees.subtract(trees.values(self.measured.variables), before)
        length = float(trees.norm(step)) * float(trees.norm(last))
        return {"3_step/cosine_of_updates": float(trees.dot(step, last)) / length} if length else {}

    def _ratio(self, step, weights, indices):
        """The length of a layer's step relative to the length of its weights; infinite where these are 0."""
        step, weights = (float(trees.norm([v[i] for i in indices])) for v in (step, weights))
        return step / weights if weights else math.inf

    def density(self):
        """The spectral density, `Density`."""
        return self.measured.density(DENSITY_VECTORS, DENSITY_STEPS)

    def bars(self, density):
        """`(bins, 3)`: left, right and height of the bars of a histogram; see `Axis`."""
        if self._axis is None:
            self._axis = Axis.of(density)
        return self._axis.bars(density, trees.count(self.weights))

    @property
    def axis(self):
        """The `Axis` of all histograms."""
        return self._axis


def _residual(pairs):
    """The residual of the first eigenpair, relative to its eigenvalue."""
    value = abs(float(pairs.values[0]))
    return float(pairs.residuals[0]) / value if value else math.inf


def _is_likelihood(model):
    """Whether labels can be drawn for all of a model's losses."""
    return model.loss is not None and of_losses.unknown(model) is None
