"""M-FAC: natural gradients with the empirical Fisher matrix of the last gradients."""

from typing import Any, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_number, register
from keras_curvature.optimizers.clipping import clipped, set_clip
from keras_curvature.optimizers.window import GradientWindow
from keras_curvature.typing import LearningRate, Vector


@register
class MFAC(GradientWindow):
    """Matrix-free natural gradients: the inverse of a Fisher matrix of the last mini-batch gradients.

    The length of a step is inversely proportional to the scale of the loss: scale regression targets to a variance
    near 1.

        F = lambda I + 1/m sum_i g_i g_i'         over the last m gradients, all weights together
        w <- w - learning_rate nu F^-1 g          nu = min(1, sqrt(kl_clip / (learning_rate^2 g'F^-1 g)))

    Trains any `keras.Model`. A step costs two passes over the window and a Cholesky decomposition of `(m, m)`; the
    state, and so a checkpoint, is `m` copies of the weights.

    Reference: Frantar, Kurtic and Alistarh, "M-FAC: efficient matrix-free approximations of second-order information"
    (2021), the dynamic algorithm, and its code `optim.py`. Differences: (1) the mean is over the gradients so far until
    the window is full, where the code divides by `m` from the start; (2) the newest gradient is a row of the window, so
    `F^-1 g` is a combination of rows and is computed as one, which keeps its precision at a small `lambda`; (3) no
    momentum of steps; (4) the window defaults to 128 gradients, in the code to 1024; (5) `kl_clip`, with a higher
    learning rate: `g'F^-1 g` grows with the number of gradients in the window, so the code's first steps are short.

    Args:
        learning_rate: Defaults to `1e-2`. With the default arguments a dense network of width 32 had 0.94 and 1.11 of
            Adam's reduction of the loss in 150 steps, with batches of 32 and 512. With the values of the code,
            `MFAC(1e-3, damping=1e-5, kl_clip=None)`, it had 0.60 and 0.95 (`tuning` data of
            `examples/benchmarks/defaults.py`).
        window: `m`. Defaults to `128`.
        damping: `lambda`, in the unit of squared gradients. Defaults to `1e-3` (the code: 1e-5).
        kl_clip: Largest `learning_rate^2 g'F^-1 g`, a positive number, or `None` for no limit. Defaults to `3e-4`.
        decay: Weight of a gradient in relation to the next one, in (0, 1]; see `tonga`. Defaults to `1.0`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `kl_clip` (`nu`), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.MFAC(window=64), loss="sparse_categorical_crossentropy")
    ```
    """

    reports = {"kl_clip": "mean", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 1e-2, window: int = 128, damping: float = 1e-3, decay: float = 1.0,
        kl_clip: float | None = 3e-4, name: str = "mfac", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, window, decay, name=name, **kwargs)
        self.damping = damping
        set_clip(self, "kl_clip", kl_clip)
        check_number(self, "damping", damping, low=0, open_low=True)

    @classmethod
    def tonga(cls, **kwargs: Any) -> Self:
        """TONGA's running covariance of gradients, as a low-rank matrix for all weights.

        Reference: Le Roux, Manzagol and Bengio, "Topmoumoute online natural gradient algorithm" (2007). Differences:
        (1) gradients older than the window are dropped, where the paper keeps the leading eigenvectors; (2) one matrix
        for all weights, no blocks; (3) second moments, no mean is subtracted; (4) the decay of 0.995 is ours.

        Example: `MFAC.tonga(learning_rate=0.01)`
        """
        return cls(**{"decay": 0.995**0.5, "name": "tonga", **kwargs})

    def precondition(self, gradients: Vector) -> Vector:
        """`-F^-1 g`."""
        seen = self.see(gradients)
        lower = tf.linalg.cholesky(seen.K / seen.total + self.damping * tf.eye(self.window, dtype=tf.float64))
        d = self.combined(tf.linalg.cholesky_solve(lower, seen.newest[:, tf.newaxis])[:, 0])
        return trees.negative(clipped(self, "kl_clip", d, gradients))
