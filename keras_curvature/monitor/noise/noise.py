"""How noisy the gradient is: the noise scale.

With `g_n` the gradient of example `n`, `G` and `S` the mean and the covariance of these in the population, and `g_b`
the mean gradient of a micro-batch of `b` examples,

    E |g_b|^2 = |G|^2 + tr(S) / b,        E g_b'H g_b = G'HG + tr(HS) / b

so that two batch sizes, of which the larger is the whole probe set, give both numbers without bias. What is divided are
averages over everything: the average of ratios, and the ratio `tr(S_B) / |g_B|^2` that a single batch gives, are not
the ratio of averages, and the latter never exceeds `B`.

Parts: the probe set is cut into some parts, and each of them into micro-batches. A part is what the jackknife leaves
out, and the batch that `H` is multiplied by, since a product for each micro-batch would be too dear.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.component import check, check_count, check_number
from keras_curvature.linearization import products
from keras_curvature.linearization.pure.micro_batches import MicroBatches

MEMORY = 8e9  # most bytes of gradients at a time


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is known of the noise in a gradient; see `noise`.

        simple = tr(S) / |G|^2,    with_curvature = tr(HS) / G'HG,    best_rate = |G|^2 / G'HG

    Attributes:
        signal: `|G|^2`, the squared norm of the gradient of the population that the examples were drawn from. An
            estimate without bias: it may come out negative where the gradient is lost in the noise.
        noise: `tr(S)`, the trace of the covariance of the gradients of single examples.
        curvature: `G'HG`; `None` where it was not measured.
        curved_noise: `tr(HS)`; `None` where it was not measured.
        stderr: Standard errors, by the jackknife over the parts of the probe set, `{name: float}` for `"signal"`,
            `"noise"`, `"simple"`, and where measured `"curvature"`, `"curved_noise"`, `"with_curvature"` and
            `"best_rate"`. They take `H` for known. Not a number where there are too few parts.
        examples: Number of examples that were used, an integer.
        micro_batches: Number of micro-batches that they were cut into, an integer.
        products: Number of curvature products, an integer.
    """

    signal: float
    noise: float
    curvature: float | None
    curved_noise: float | None
    stderr: dict
    examples: int
    micro_batches: int
    products: int

    @property
    def simple(self):
        """The noise scale `tr(S) / |G|^2`, in examples: of so many, the mean gradient is as long as its error.

        Infinite where `signal` is not positive: these examples are too few to see the gradient.
        """
        return _simple(self.signal, self.noise)

    @property
    def with_curvature(self):
        """`tr(HS) / G'HG`, in examples; `None` where not measured, not a number where `G'HG` is not positive."""
        return None if self.curvature is None else _over(self.curved_noise, self.curvature)

    @property
    def critical_batch(self):
        """The batch size at which one step of its best rate gains half of what a step along `G` itself would.

        That is `with_curvature` where it was measured and is positive, else `simple`, which is the same where `H` is
        a multiple of the identity. A training at this size all along takes twice the fewest steps there could be, and
        twice the fewest examples: `E_min / S_min` of McCandlish et al. (2018), if the noise scale did not change. It
        does: it grows in the course of a training.
        """
        curved = self.with_curvature
        return curved if curved is not None and curved > 0 else self.simple

    @property
    def best_rate(self):
        """`|G|^2 / G'HG`, the rate at which a step along `-G` lowers the loss most: of gradient descent, no momentum.

        `None` where not measured; not a number where one of the two is not positive.
        """
        return None if self.curvature is None else _rate(self.signal, self.curvature)

    def rate(self, batch_size):
        """The best rate of one step with the gradient of `batch_size` examples: `best_rate / (1 + B_noise / B)`.

        Args:
            batch_size: `B`, a number of examples.
        """
        check_number(Noise.rate, "batch_size", batch_size, low=0, open_low=True)
        return None if self.curvature is None else self.best_rate / (1.0 + self.with_curvature / batch_size)


def noise(objective, micro_batch=8, parts=16, curvature=True):
    """The noise scale of the gradient on a probe set, by two batch sizes.

        tr(S) ~ (sum_i b_i |g_i|^2 - N |g|^2) / (K - 1),        |G|^2 ~ |g|^2 - tr(S) / N

    with `g_i` the mean gradients of the `K` micro-batches, of `b_i` of the `N` examples, and `g` that of all of them.
    Both are without bias, and of micro-batches of one size the two-batch estimators of McCandlish et al. (2018),
    appendix A.1. With `|g|^2` read as `g'Hg`, and parts for micro-batches, they are those of `tr(HS)` and `G'HG`.

    Reference: McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An Empirical Model of Large-Batch Training" (2018),
    arXiv 1812.06162.

    Cost: one gradient of the probe set, micro-batch by micro-batch, and `parts` products; memory: `parts` gradients.

    What an example's gradient is: the derivative of the compiled loss as if all of the batch were like this example.
    Of a mean over the batch that is the gradient of the example's own loss, times its sample weight (weights are part
    of the noise); regularizers are in all of them, and no noise. Of `reduction="sum"` it is that times the batch size,
    which changes `signal`, `noise` and `best_rate`, but no noise scale. In training mode dropout masks are part of the
    noise, and batch normalization sees the micro-batch and not the batch, in the gradients and not in `H`. Where a
    batch cannot be cut into parts of one size, a few of its examples (fewer than `parts`) are left out.

    Args:
        objective: `Objective`, whose `kind` says what `H` is.
        micro_batch: `b`, the most examples of a micro-batch, an integer; `1` has the least error, and takes
            longest. Defaults to `8` (as accurate as `1` but for the first steps of a training).
        parts: The most parts that the probe set is cut into, an integer of at least 2: the relative error of `tr(HS)`
            is about `sqrt(2 / (d parts))` with `d` the number of directions that matter in `HS`. Defaults to `16`.
        curvature: Whether to compute what takes products. Defaults to `True`.

    Returns:
        `Noise`.

    Raises:
        ValueError: There are fewer than two micro-batches; the gradients of the parts need more than 8 GB; an argument
            is none of these.

    Example:

    ```python
    found = noise(Objective(model, (x, y), kind="ggn"))
    print(f"noise scale {found.simple:.0f} ± {found.stderr['simple']:.0f} examples")
    ```
    """
    check_count(noise, "micro_batch", micro_batch)
    check_count(noise, "parts", parts, low=2)
    check(noise, "curvature", curvature, isinstance(curvature, bool), "True or False")
    _check_memory(objective.variables, parts)
    swept = _swept(objective, micro_batch, parts)
    if len(swept) < 2:
        raise ValueError(
            f"`noise`: `micro_batch` must leave two micro-batches at least, to compare two batch sizes. Received: "
            f"micro_batch={micro_batch} and {objective.examples} examples. Use a smaller `micro_batch`, or more "
            "examples."
        )
    gradients = [part["gradient"] for part in swept]
    found = _Parts(
        *[np.array([float(part[name]) for part in swept]) for name in ("examples", "batches", "squares")],
        _inner(gradients, gradients),
        # one at a time: a product is as long as all of the weights
        np.concatenate([_inner(gradients, [objective.product(g)]) for g in gradients], 1) if curvature else None,
    )
    return found.noise()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Numbers of the parts of a probe set.

    Attributes:
        examples, batches: Numbers of examples and of micro-batches, `(parts,)`.
        squares: `sum_i b_i |g_i|^2` over the micro-batches, `(parts,)`.
        inner: `g_j'g_k` of the mean gradients of the parts, `(parts, parts)`.
        curved: `g_j'H g_k`, or `None`.
    """

    examples: np.ndarray
    batches: np.ndarray
    squares: np.ndarray
    inner: np.ndarray
    curved: np.ndarray | None

    def noise(self):
        """`Noise`, with standard errors."""
        left = [self._without(j)._everything() for j in range(len(self.examples))]
        stderr = {name: _jackknife([one[name] for one in left]) for name in left[0]}
        signal, noise, curvature, curved_noise = self._estimates()
        used, batches = int(self.examples.sum()), int(self.batches.sum())
        products = 0 if self.curved is None else len(self.examples)
        return Noise(signal, noise, curvature, curved_noise, stderr, used, batches, products)

    def _estimates(self):
        signal, noise = _two_sizes(self.squares.sum(), self._along(self.inner), self.batches.sum(), self.examples.sum())
        if self.curved is None:
            return signal, noise, None, None
        parts = float(self.examples @ np.diag(self.curved)), self._along(self.curved)
        return signal, noise, *_two_sizes(*parts, len(self.examples), self.examples.sum())

    def _everything(self):
        signal, noise, curvature, curved_noise = self._estimates()
        found = {"signal": signal, "noise": noise, "simple": _simple(signal, noise)}
        if curvature is not None:
            found |= {"curvature": curvature, "curved_noise": curved_noise}
            found |= {"with_curvature": _over(curved_noise, curvature), "best_rate": _rate(signal, curvature)}
        return found

    def _along(self, matrix):
        """`g'g` or `g'Hg` of the mean gradient of all examples."""
        share = self.examples / self.examples.sum()
        return float(share @ matrix @ share)

    def _without(self, j):
        rest = np.arange(len(self.examples)) != j
        numbers = [a[rest] for a in (self.examples, self.batches, self.squares)]
        return _Parts(*numbers, *[None if m is None else m[rest][:, rest] for m in (self.inner, self.curved)])


def two_batch_sizes(small, large, squared_small, squared_large):
    """`(|G|^2, tr S)` of squared norms of mean gradients at two batch sizes, without bias.

        |G|^2 ~ (B |g_B|^2 - b |g_b|^2) / (B - b),        tr(S) ~ (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    Of one training step these are rough (the first is negative in up to 40 % of the steps): average both over the steps
    with `NoiseAverage`, and divide then.

    Reference: McCandlish et al. (2018), appendix A.1.

    Args:
        small, large: `b < B`, numbers of examples: of a micro-batch or a replica's slice, and of the batch.
        squared_small: `|g_b|^2`, the mean over all micro-batches of the step.
        squared_large: `|g_B|^2`.

    Raises:
        ValueError: `large` is not larger than `small`, as with a single micro-batch.
    """
    check_number(two_batch_sizes, "small", small, low=0, open_low=True)
    check(two_batch_sizes, "large", large, large > small,
          f"larger than small={small}: cut the batch into two micro-batches at least")  # fmt: skip
    count = large / small
    return _two_sizes(large * squared_small, squared_large, count, large)


@dataclasses.dataclass(frozen=True)
class NoiseAverage:
    """The noise scale over the steps of a training, a ratio of averages.

        a <- decay a + (1 - decay) a_t,    scale = average of tr(S) / average of |G|^2

    with weights that sum to 1 from the first step on (each average is divided by `1 - decay^t`). A record: `update`
    gives a new one.

    Args:
        decay: In [0, 1). Defaults to `0.99`, an average over about the last 100 steps.
        steps, signal_sum, noise_sum: What was put in so far. Default to nothing.

    Example:

    ```python
    average = NoiseAverage()
    for step in range(steps):
        average = average.update(*two_batch_sizes(8, 64, squared_small[step], squared_large[step]))
    average.scale
    ```
    """

    decay: float = 0.99
    steps: int = 0
    signal_sum: float = 0.0
    noise_sum: float = 0.0

    def __post_init__(self):
        check_number(self, "decay", self.decay, low=0, high=1)
        check(self, "decay", self.decay, self.decay < 1, "less than 1")

    def update(self, signal, noise):
        """The record after one step with these `|G|^2` and `tr S`; one that is not finite is left out."""
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return self
        return NoiseAverage(
            self.decay, self.steps + 1,
            self.decay * self.signal_sum + (1 - self.decay) * float(signal),
            self.decay * self.noise_sum + (1 - self.decay) * float(noise),
        )  # fmt: skip

    @property
    def signal(self):
        """The average of `|G|^2`; not a number before the first step."""
        return self._corrected(self.signal_sum)

    @property
    def noise(self):
        """The average of `tr S`; not a number before the first step."""
        return self._corrected(self.noise_sum)

    @property
    def scale(self):
        """The noise scale, in examples; infinite where the average of `|G|^2` is not positive (yet)."""
        return _simple(self.signal, self.noise)

    def _corrected(self, total):
        return total / (1.0 - self.decay**self.steps) if self.steps else math.nan


# The parts of a probe set.


def _check_memory(variables, parts):
    each = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)
    most = int(MEMORY // each)
    if most < parts + 2:  # two products are there at a time, beside the gradients
        remedy = f"Pass `parts={most - 2}` or fewer." if most >= 4 else "Measure a smaller model."
        raise ValueError(
            f"`noise`: the gradients of {parts} parts need {(parts + 2) * each / 1e9:.3g} GB of memory, more than "
            f"{MEMORY / 1e9:.3g} GB. {remedy}"
        )


def _swept(objective, micro_batch, parts):
    """Sums over the micro-batches of each part, a list of dicts; at most `parts`, out of all batches alike."""
    found = {}
    for i, part in enumerate(_each_part(objective, micro_batch, max(1, parts // objective.batches))):
        k = i % parts
        found[k] = tf.nest.map_structure(tf.add, found[k], part) if k in found else part
    return [part | {"gradient": trees.scale(1.0 / part["examples"], part["gradient"])} for part in found.values()]


def _each_part(objective, micro_batch, most):
    """The sums of one part after another: of each batch the rows in their order, cut into `most` at most."""
    devices = replicas.strategy_of(objective.model).num_replicas_in_sync
    for number, count in enumerate(objective.counts):
        shortest = count // devices  # of the replicas' slices
        pieces = _number_of_pieces(shortest, micro_batch, -(-most // devices))
        length = max(1, shortest // pieces)
        cut = -(-length // micro_batch)
        for index in range(pieces):
            sums = objective.on_batch(number, ("noise", length, cut), _sums(length, cut), index)
            yield from (tf.nest.map_structure(lambda s, r=r: s[r], sums) for r in range(devices))


def _number_of_pieces(examples, micro_batch, most):
    """Of the numbers of pieces that are near to the most there may be, the one that leaves out fewest examples."""
    most = max(1, min(most, examples // micro_batch))
    return min(range((most + 1) // 2, most + 1), key=lambda pieces: (examples % pieces, -pieces))


def _sums(length, micro_batches):
    """A function of a `Linearization` and the index of a part, of `length` rows of each replica's slice.

    What it gives has a row for each replica: their parts are parts of their own, as if one replica had them all.
    """

    def of_parts(lin, index):
        def here(whole, weights):
            part = MicroBatches(whole.part(index * length, length), micro_batches)
            sums = part.sum(lambda pure: of_micro_batch(pure, weights))
            own = tf.one_hot(replicas.number(), replicas.count(), dtype=tf.float64)
            return tf.nest.map_structure(lambda s: tf.tensordot(tf.cast(own, s.dtype), s, 0), sums)

        def of_micro_batch(pure, weights):
            _, gradient = products.gradient(pure, weights)
            dtype = trees.scalar_dtype(gradient)
            examples, whole = tf.cast(pure.place.examples, dtype), tf.cast(pure.place.total, dtype)
            # the loss here is the micro-batch's share of that of the batch
            squares = trees.squared_norm(gradient) * whole**2 / examples
            counts = {"examples": examples, "batches": tf.ones([], dtype), "squares": squares}
            return counts | {"gradient": trees.scale(whole, gradient)}

        return lin.total(here)

    return of_parts


# Arithmetic.


def _two_sizes(squares, squared, batches, examples):
    """`(|G|^2, tr S)` of `sum_i b_i |g_i|^2` over so many micro-batches, and `|g|^2` of all their examples."""
    if batches <= 1:
        return math.nan, math.nan
    noise = float((squares - examples * squared) / (batches - 1))
    return float(squared) - noise / float(examples), noise


def _inner(left, right):
    """Inner products of vectors, an array `(left, right)`."""
    total = 0.0
    for columns, rows in zip(zip(*right), zip(*left)):
        stacked = tf.stack(rows)
        axes = list(range(1, stacked.shape.rank))
        # sums of products, as in `trees.dot`: matrix products are rounded on some devices
        total += np.stack([tf.reduce_sum(stacked * column, axes).numpy().astype(np.float64) for column in columns], 1)
    return total


def _simple(signal, noise):
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    return noise / signal if signal > 0 else math.inf


def _over(noise, signal):
    return noise / signal if signal > 0 else math.nan


def _rate(signal, curvature):
    return signal / curvature if signal > 0 and curvature > 0 else math.nan


def _jackknife(left_out):
    """The standard error of an estimate, from what it is with each of the parts left out."""
    values = np.array(left_out)
    parts = len(values)
    finite = np.isfinite(values).all()
    return float(np.sqrt((parts - 1) / parts * np.sum((values - values.mean()) ** 2))) if finite else math.nan
