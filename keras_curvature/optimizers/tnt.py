"""TNT: the Fisher matrix of each weight as the covariance of a tensor-normal distribution."""

import math
from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import axes
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.optimizers.clipping import clip_note, clipped, set_clip
from keras_curvature.optimizers.limits import LinearStep, heavy_ball
from keras_curvature.solvers import direct
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class TNT(ByAxis):
    """TNT: momentum divided along each axis by the covariance of gradients for labels drawn from the model.

        V_i <- eps V_i + (1 - eps) unfold_i(s) unfold_i(s)',    eps = min(1 - 1/t, beta)
        U_i = V_i / (c^(k - 1) prod_(j != i) n_j),              c^k = tr V_1 / prod n
        M <- momentum M + g
        d = M x_1 (U_1 + damping I)^-1 x_2 (U_2 + damping I)^-1 ...
        w <- w - learning_rate nu d,    nu = min(1, sqrt(kl_clip / (learning_rate^2 d'M)))

    with `g` the gradient, `s` that of the same loss for drawn labels, `n_i` the lengths of the `k` axes of a weight. If
    `s` is tensor-normal, `U_1 x U_2 x ...` is its covariance, and `c` the mean eigenvalue that all its factors are
    given. The statistics are those of Shampoo, but of drawn labels, and the inverses are not roots: for a dense layer
    whose inputs and slopes are independent, `U_1` and `U_2` are K-FAC's factors, up to the scale of a gradient of a
    whole batch. It needs no layer: any model has these axes.

    Reference: Ren and Goldfarb, "Tensor normal training for deep learning models" (2021), and
    github.com/renyiryry/tnt_neurips_2021. Differences from that code: (1) the averages begin with a running mean
    (there: the mean over some batches before the first step); (2) neighbouring axes are merged from the front to at
    most `merge`, which makes a convolution a matrix of all its inputs, as theirs; (3) axes longer than `max_dimension`
    get no factor; (4) `kl_clip`. `kl_clip=None` is the method of the paper; on small networks with batches of 32
    it diverged after some 20 steps.

    Args:
        learning_rate: Defaults to `1e-4` (the authors).
        damping: Added to each factor; positive. Defaults to `0.01` (the authors, for convolutions; 0.1 for an
            autoencoder).
        momentum: Factor on the old `M`, in [0, 1). Defaults to `0.9` (the authors).
        beta: Largest weight of the old `V_i`, in [0, 1). Defaults to `0.9` (the authors).
        factors_every: Steps between two updates of the `V_i`, each with one more backward pass. Defaults to `10` (the
            authors).
        inverses_every: Steps between two inversions; the replicas share the work. Defaults to `100` (the authors).
        kl_clip: Largest `learning_rate^2 d'M`, a positive number, or `None` for no limit. Defaults to `1e-4`: 1.02 to
            1.36 of Adam's reduction of the loss in 150 steps on a dense and a convolutional network with batches of 32
            and 512; with 1e-3 the dense one did not learn with batches of 32 (`tuning` data of
            `examples/benchmarks/defaults.py`).
        max_dimension: Longest axis with a factor. Defaults to `1000`.
        merge: Longest axis after merging. Defaults to `1000`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `kl_clip` (`nu`), `failed_refreshes` (factors and inverses that were not finite; the old ones are kept),
        `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.TNT(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs()
    reports = {"kl_clip": "mean", **ByAxis.reports}

    def __init__(
        self, learning_rate: LearningRate = 1e-4, damping: float = 0.01, momentum: float = 0.9, beta: float = 0.9,
        factors_every: int = 10, inverses_every: int = 100, max_dimension: int = 1000, merge: int = 1000,
        kl_clip: float | None = 1e-4, name: str = "tnt", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum, self.beta = damping, momentum, beta
        self.factors_every, self.inverses_every = factors_every, inverses_every
        self.max_dimension, self.merge = max_dimension, merge
        set_clip(self, "kl_clip", kl_clip)
        check_number(self, "damping", damping, low=0, open_low=True)
        for argument, factor in (("momentum", momentum), ("beta", beta)):
            check_number(self, argument, factor, low=0, high=1, open_high=True)
        for argument in ("factors_every", "inverses_every", "max_dimension", "merge"):
            check_count(self, argument, getattr(self, argument))

    def create_state(self, variables: Variables) -> None:
        """The sum of gradients, the covariances, their inverses, and the number of looks at each covariance."""
        self.create_tiles(variables, self.merge, longest=self.max_dimension)
        self._m = self.add_moments("m")
        self._factors = self.add_matrices("factor", "identity")
        self._inverses = self.add_matrices("inverse", "identity")
        self._counts = self.add_variable((len(self._places),), name="looks", aggregation="none")

    def direction(self, lin: Linearization) -> Vector:
        """The negative of `M`, divided along each axis, as long as `kl_clip` allows."""
        M = [self.momentum * old + new for old, new in zip(trees.values(self._m), self.split(lin.gradient))]
        self.taken()
        self.remember(self._m, M)
        inverses = self._refreshed(lin) if self._places else []
        d = clipped(self, "kl_clip", self._divided(M, inverses), M)
        return self.join(trees.negative(d), lin.gradient)

    def linear_step(self) -> LinearStep:
        """Heavy ball, times the inverses of the last step."""
        return LinearStep(heavy_ball(self.momentum), self._preconditioner, clip_note(self, "kl_clip"))

    def _preconditioner(self):
        inverses = trees.values(self._inverses)
        return self.operator(lambda tiles: self._divided(tiles, inverses))

    def _divided(self, tiles, inverses):
        return [axes.multiply(tile, each) for tile, each in zip(tiles, self.by_tile(inverses))]

    def _refreshed(self, lin):
        def look():
            counts = tf.identity(self._counts.value)
            S = self.split(lin.sampled_gradient(tf.cast(self.iterations, tf.int32)))
            kept = tf.cast(tf.minimum(1.0 - 1.0 / (counts + 1.0), self.beta), self._dtype)
            new = [axes.second_moment(S[i], k) for i, k in self._places]
            old = trees.values(self._factors)
            averages = [e * a + (1.0 - e) * b for e, a, b in zip(tf.unstack(kept), old, new)]
            fine = tf.stack([trees.has_finite_sum(average) for average in averages])
            return [*averages, counts + tf.cast(fine, counts.dtype)]

        *factors, _ = self.refresh([*self._factors, self._counts], self.factors_every, look)

        def invert():
            scaled = [V / scale for V, scale in zip(factors, self._scales(factors))]
            return in_stacks(lambda A: direct.inverse(A, self.damping), scaled)

        return self.refresh(self._inverses, self.inverses_every, invert)

    def _scales(self, factors):
        """`c^(k - 1) prod_(j != i) n_j` of each factor; 1 for a factor of zeros."""
        first, found = {}, []
        for (i, k), V in zip(self._places, factors):
            shape = self._shapes[i]
            entries, order = math.prod(shape), len(shape)
            trace = first.setdefault(i, tf.linalg.trace(V))  # all traces of a weight are the same
            c = tf.pow(trace / entries, 1.0 / order)
            scale = tf.pow(c, float(order - 1)) * (entries / shape[k])
            found.append(tf.where(scale > 0, scale, tf.ones_like(scale)))
        return found
