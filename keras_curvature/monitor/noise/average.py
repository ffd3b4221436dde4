"""The noise scale over the steps of a training, from the gradients at two batch sizes that each step has."""

import dataclasses
import math

from keras_curvature.component import check, check_number


def two_batch_sizes(small, large, squared_small, squared_large):
    """`(|G|^2, tr S)` from squared norms of mean gradients at two batch sizes, without bias.

        |G|^2 ~ (B |g_B|^2 - b |g_b|^2) / (B - b),        tr(S) ~ (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    From one training step these are rough (the first is negative in up to 40 % of the steps): average both over the
    steps with `NoiseAverage`, and divide afterwards.

    Reference: McCandlish et al. (2018), "An Empirical Model of Large-Batch Training", appendix A.1.

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
    return from_sums(large * squared_small, squared_large, count, large)


def from_sums(squares, squared, batches, examples):
    """`(|G|^2, tr S)` from `sum_i b_i |g_i|^2` over the micro-batches and `|g|^2` of all their examples."""
    if batches <= 1:
        return math.nan, math.nan
    noise = float((squares - examples * squared) / (batches - 1))
    return float(squared) - noise / float(examples), noise


def scale_of(signal, noise):
    """The noise scale `tr(S) / |G|^2`: infinite where the signal is not positive, NaN where both are 0."""
    if math.isnan(signal) or math.isnan(noise) or signal == noise == 0:
        return math.nan
    return noise / signal if signal > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class NoiseAverage:
    """The noise scale over the steps of a training, as a ratio of averages.

        a <- decay a + (1 - decay) a_t,    scale = average of tr(S) / average of |G|^2

    Each average is divided by `1 - decay^t`, so its weights sum to 1 from the first step on. This is a record: `update`
    returns a new one.

    Args:
        decay: In [0, 1). Defaults to `0.99`, an average over about the last 100 steps.
        steps, signal_sum, noise_sum: The steps and sums so far. Default to none.

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
        """The record after one step with these `|G|^2` and `tr S`; a step that is not finite is ignored."""
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return self
        return NoiseAverage(
            self.decay, self.steps + 1,
            self.decay * self.signal_sum + (1 - self.decay) * float(signal),
            self.decay * self.noise_sum + (1 - self.decay) * float(noise),
        )  # fmt: skip

    @property
    def signal(self):
        """The average of `|G|^2`; NaN before the first step."""
        return self._corrected(self.signal_sum)

    @property
    def noise(self):
        """The average of `tr S`; NaN before the first step."""
        return self._corrected(self.noise_sum)

    @property
    def scale(self):
        """The noise scale, in examples; infinite while the average of `|G|^2` is not positive."""
        return scale_of(self.signal, self.noise)

    def _corrected(self, total):
        return total / (1.0 - self.decay**self.steps) if self.steps else math.nan
