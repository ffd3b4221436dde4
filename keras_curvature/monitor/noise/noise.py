"""The noise scale of the gradient on fixed examples.

`g_n` is the gradient of example `n`; `G` and `S` are the mean and the covariance of these gradients in the population;
`g_b` is the mean gradient of a micro-batch of `b` examples. Then

    E |g_b|^2 = |G|^2 + tr(S) / b,        E g_b'H g_b = G'HG + tr(HS) / b

so two batch sizes, the larger being all examples, give both numbers without bias. The ratio is taken of averages over
everything. An average of ratios differs from it, and so does the ratio `tr(S_B) / |g_B|^2` of a single batch, which
never exceeds `B`.

Parts: the examples are cut into parts, and each part into micro-batches. The jackknife leaves out one part at a time,
and `H` multiplies the gradients of parts, since a product for each micro-batch would cost too much.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_curvature.component import check_count, check_flag, check_number
from keras_curvature.monitor.noise.average import from_sums, scale_of
from keras_curvature.monitor.noise.parts import check_memory, inner_products, sums_of_parts
from keras_curvature.solvers.flat import ProductNotFinite


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise in a gradient; see `noise`.

        simple = tr(S) / |G|^2,    with_curvature = tr(HS) / G'HG,    best_rate = |G|^2 / G'HG

    Attributes:
        signal: `|G|^2`, the squared norm of the population's gradient. The estimate is unbiased, so it may be negative
            where the noise hides the gradient.
        noise: `tr(S)`, the trace of the covariance of the per-example gradients.
        curvature: `G'HG`; `None` where it was not measured.
        curved_noise: `tr(HS)`; `None` where it was not measured.
        stderr: Standard errors by the jackknife over the parts, `{name: float}` for `"signal"`, `"noise"`, `"simple"`,
            and where measured `"curvature"`, `"curved_noise"`, `"with_curvature"` and `"best_rate"`. They treat `H` as
            known. NaN where there are too few parts, or where the number has no finite value without one of them.
        examples: Number of examples used, an integer.
        micro_batches: Number of micro-batches, an integer.
        products: Number of curvature products, an integer.
    """

    signal: float
    noise: float
    curvature: float | None
    curved_noise: float | None
    stderr: dict[str, float]
    examples: int
    micro_batches: int
    products: int

    @property
    def simple(self) -> float:
        """The noise scale `tr(S) / |G|^2`, in examples: the mean gradient of so many is as long as its error.

        Infinite where `signal` is not positive: these examples are too few to see the gradient. NaN where the gradient
        of every example is zero.
        """
        return scale_of(self.signal, self.noise)

    @property
    def with_curvature(self) -> float | None:
        """`tr(HS) / G'HG`, in examples; `None` where not measured, NaN where `G'HG` is not positive."""
        return None if self.curvature is None else _over(self.curved_noise, self.curvature)

    @property
    def critical_batch(self) -> float:
        """The batch size at which one step with its best learning rate gains half of what a step along `G` would.

        This is `with_curvature` where it was measured and is positive, else `simple`, which is the same where `H` is a
        multiple of the identity. Training at this size throughout takes twice the fewest possible steps and twice the
        fewest possible examples, `E_min / S_min` of McCandlish et al. (2018), if the noise scale stayed constant. In
        fact it grows during training.
        """
        curved = self.with_curvature
        return curved if curved is not None and curved > 0 else self.simple

    @property
    def best_rate(self) -> float | None:
        """`|G|^2 / G'HG`, the learning rate at which a gradient descent step without momentum lowers the loss most.

        `None` where not measured; NaN where one of the two is not positive.
        """
        return None if self.curvature is None else _rate(self.signal, self.curvature)

    def rate(self, batch_size: float) -> float | None:
        """The best learning rate for one step with `batch_size` examples: `best_rate / (1 + B_noise / B)`.

        Args:
            batch_size: `B`, a number of examples.
        """
        check_number(Noise.rate, "batch_size", batch_size, low=0, open_low=True)
        best, scale = self.best_rate, self.with_curvature
        return None if best is None or scale is None else best / (1.0 + scale / batch_size)


def noise(objective, micro_batch=8, parts=16, curvature=True):
    """The noise scale of the gradient on fixed examples, from two batch sizes.

        tr(S) ~ (sum_i b_i |g_i|^2 - N |g|^2) / (K - 1),        |G|^2 ~ |g|^2 - tr(S) / N

    with the mean gradients `g_i` of the `K` micro-batches, of `b_i` of the `N` examples, and `g` that of all examples.
    Both are unbiased; for micro-batches of equal size they are the two-batch estimators of McCandlish et al. (2018),
    appendix A.1. With `g'Hg` in place of `|g|^2` and parts in place of micro-batches, they estimate `tr(HS)` and
    `G'HG`.

    Reference: McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An Empirical Model of Large-Batch Training" (2018),
    arXiv 1812.06162.

    Cost: one gradient of all examples, micro-batch by micro-batch, and `parts` products. Memory: `parts` gradients.

    The gradient of an example is its term in the mean over all examples. For a mean over the batch this is the gradient
    of the example's own loss times its sample weight (so weights are part of the noise); regularizers are in every
    gradient and add no noise. For `reduction="mean_with_sample_weight"` and for masked losses it is the gradient of the
    sum over the example's steps, times their weights. It is divided by the mean of these weights (or of the number of
    unmasked steps) over all examples, which counts as known. For `reduction="sum"` it is the mean's times the batch
    size, which changes `signal`, `noise` and `best_rate`, but no noise scale. A loss that couples examples is the mean
    of the micro-batches' losses here, and a warning names it. In training mode dropout masks are part of the noise.
    Batch normalization then uses the micro-batch in the gradients, and the batch in `H`. Where a batch cannot be cut
    into parts of equal size, fewer than `parts` of its examples are left out.

    Args:
        objective: An `Objective`; its `kind` is the matrix `H`.
        micro_batch: `b`, the largest number of examples in a micro-batch, an integer. `1` has the smallest error and
            takes longest. Defaults to `8` (as accurate as `1` after the first steps of a training).
        parts: The largest number of parts, an integer of at least 2. The relative error of `tr(HS)` is about
            `sqrt(2 / (d parts))`, where `d` is the number of directions that matter in `HS`. Defaults to `16`.
        curvature: Whether to compute the numbers that take products. Defaults to `True`.

    Returns:
        A `Noise`.

    Raises:
        ValueError: There are fewer than two micro-batches; the gradients of the parts need more than 8 GB; gradients or
            products are not finite; an argument is invalid.

    Example:

    ```python
    found = noise(Objective(model, (x, y), kind="ggn"))
    print(f"noise scale {found.simple:.0f} ± {found.stderr['simple']:.0f} examples")
    ```
    """
    check_count(noise, "micro_batch", micro_batch)
    check_count(noise, "parts", parts, low=2)
    check_flag(noise, "curvature", curvature)
    check_memory(objective.variables, parts)
    swept = sums_of_parts(objective.in_parts(), micro_batch, parts)
    if len(swept) < 2:
        raise ValueError(
            "`noise`: `micro_batch` must leave at least two micro-batches, to compare two batch sizes. Received: "
            f"micro_batch={micro_batch} and {objective.examples} examples. Use a smaller `micro_batch`, or more "
            "examples."
        )
    return _parts(objective, swept, curvature).noise()


def _parts(objective, swept, curvature):
    gradients = [part["gradient"] for part in swept]
    numbers = [np.array([float(part[name]) for part in swept]) for name in ("examples", "batches", "squares")]
    if not np.isfinite(numbers).all():
        raise ProductNotFinite("The squared norms of the gradients of the examples are")
    curved = None
    if curvature:
        like = objective.weights
        # one product at a time: each is as long as all of the weights
        products = (objective.product([tf.cast(a, w.dtype) for a, w in zip(g, like)]) for g in gradients)
        columns = [inner_products(gradients, [product]) for product in products]
        curved = np.concatenate(columns, 1)
        if not np.isfinite(curved).all():
            raise ProductNotFinite
    return _Parts(*numbers, inner_products(gradients, gradients), curved)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Numbers of the parts of the examples.

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
        left_out = [self._without(j)._everything() for j in range(len(self.examples))]
        stderr = {name: _jackknife([one[name] for one in left_out]) for name in left_out[0]}
        signal, noise, curvature, curved_noise = self._estimates()
        used, batches = int(self.examples.sum()), int(self.batches.sum())
        products = 0 if self.curved is None else len(self.examples)
        return Noise(signal, noise, curvature, curved_noise, stderr, used, batches, products)

    def _estimates(self):
        used = self.examples.sum()
        signal, noise = from_sums(self.squares.sum(), self._along(self.inner), self.batches.sum(), used)
        if self.curved is None:
            return signal, noise, None, None
        squares = float(self.examples @ np.diag(self.curved))
        return signal, noise, *from_sums(squares, self._along(self.curved), len(self.examples), used)

    def _everything(self):
        signal, noise, curvature, curved_noise = self._estimates()
        found = {"signal": signal, "noise": noise, "simple": scale_of(signal, noise)}
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


def _over(noise, signal):
    return noise / signal if signal > 0 else math.nan


def _rate(signal, curvature):
    return signal / curvature if signal > 0 and curvature > 0 else math.nan


def _jackknife(left_out):
    """The standard error of an estimate, from its values with each of the parts left out."""
    values = np.array(left_out)
    parts = len(values)
    finite = np.isfinite(values).all()
    return float(np.sqrt((parts - 1) / parts * np.sum((values - values.mean()) ** 2))) if finite else math.nan
