"""Inverse-free Shampoo: a factor for each axis that is learnt by matrix products alone."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import axes
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.optimizers.by_layer import whole_or_nan
from keras_curvature.optimizers.clipping import clip_note, clipped, set_clip
from keras_curvature.optimizers.limits import LinearStep, heavy_ball
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.solvers.inverse_free import InverseFreeAxes
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class IFShampoo(ByAxis):
    """Inverse-free Shampoo: factors `K_i` for the axes of each weight, `K_1 K_1' x K_2 K_2' x ... ~ F^-1`, by products.

    The length of a step is inversely proportional to the scale of the loss: scale regression targets to a variance
    near 1.

        Z = sqrt(N) g x_1 K_1' x_2 K_2' ...                                g: gradient of the mean over N examples
        H_i = unfold_i(Z) unfold_i(Z)' / prod_(j != i) n_j
        M_i <- beta M_i + (1 - beta)/2 (H_i + damping prod_(j != i) (tr(K_j'K_j)/n_j) K_i'K_i - I)
        K_i <- K_i - rate K_i M_i / max(1, |M_i|)                                              every so many steps
        d = g x_1 K_1 K_1' x_2 K_2 K_2' ...
        v <- momentum v - min(1, sqrt(kl_clip / (learning_rate^2 d'g))) d,    w <- w + learning_rate v

    with `n_i` the lengths of the axes of a weight. `N g g'` stands for the Fisher matrix `F`, as in Shampoo, but the
    step has no root of it. Nothing is inverted or decomposed, so nothing can fail, whatever the rank of the gradients.
    It is `SINGD` without layers: any model has these axes. The `K_i` change by at most `rate` in `every` steps: where
    gradients grow faster, as in recurrent networks, `kl_clip` keeps the steps short.

    Reference: Lin, Dangel, Eschenhagen, Bae, Turner and Makhzani, "Can we remove the square-root in adaptive gradient
    methods? A second-order perspective" (2024), and `myoptim/ifshampoo.py` of
    github.com/yorkerlin/remove-the-square-root. Differences from that code: (1) the `K_i` begin as the multiples of the
    identity that fit the first batch (there: the identity); (2) neighbouring axes are merged from the front to at most
    `merge`, and axes longer than `max_dimension` have no factor; (3) one `rate` for all weights (there a quarter of it
    for biases and normalization); (4) weight decay is Keras', not part of `v`; (5) the state is in float32 at least;
    (6) `kl_clip`; `kl_clip=None` is the authors' method, which diverged on an LSTM with batches of 32 (`tuning` data of
    `examples/benchmarks/defaults.py`).

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `3e-3`: 0.95 to 1.84 of Adam's reduction of loss in
            150 steps on two perceptrons, a convolutional network, an LSTM and a regression with batches of 32 and 512
            (`tuning` data of `examples/benchmarks/defaults.py`).
        damping: Positive. Defaults to `1e-4` (the authors).
        momentum: Factor on the last step, in [0, 1). Defaults to `0.9` (as in `SINGD`).
        beta: Factor on the old `M_i`, in [0, 1). Defaults to `0.5` (the authors).
        rate: Length of a change of the `K_i`, in (0, 1). Defaults to `0.05` (the authors).
        every: Steps between two changes of the `K_i`; the replicas share the work. Defaults to `10` (the authors).
        max_dimension: Longest axis with a factor. Defaults to `1000`.
        merge: Longest axis after merging. Defaults to `1000`.
        kl_clip: Largest `learning_rate^2 d'g`, a positive number, or `None` for no limit. Defaults to `1e-5`; at
            1e-3, with a rate of 1e-2, a perceptron diverged.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `kl_clip` (the multiple of `d`), `failed_refreshes` (factors that were not finite; the old ones are kept),
        `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.IFShampoo(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs()
    reports = {"kl_clip": "mean", **ByAxis.reports}

    def __init__(
        self, learning_rate: LearningRate = 3e-3, damping: float = 1e-4, momentum: float = 0.9, beta: float = 0.5,
        rate: float = 0.05, every: int = 10, max_dimension: int = 1000, merge: int = 1000,
        kl_clip: float | None = 1e-5, name: str = "if_shampoo", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum, self.beta, self.rate, self.every = damping, momentum, beta, rate, every
        self.max_dimension, self.merge = max_dimension, merge
        check_number(self, "damping", damping, low=0, open_low=True)
        for argument, factor in (("momentum", momentum), ("beta", beta)):
            check_number(self, argument, factor, low=0, high=1, open_high=True)
        check_number(self, "rate", rate, low=0, high=1, open_low=True, open_high=True)
        for argument in ("every", "max_dimension", "merge"):
            check_count(self, argument, getattr(self, argument))
        set_clip(self, "kl_clip", kl_clip)
        self._rule = InverseFreeAxes(damping, beta, rate, max_dimension)

    def create_state(self, variables: Variables) -> None:
        """The last step; the factors, their momenta, and how often those of each weight changed."""
        self.create_tiles(variables, self.merge, longest=self.max_dimension)
        self._velocity = self.add_moments("velocity")
        self._factors = self.add_matrices("factor", "identity")
        self._momenta = self.add_matrices("momentum")
        self._with_factors = sorted({i for i, _ in self._places})
        self._counts = self.add_variable((len(self._with_factors),), name="looks", aggregation="none")

    def direction(self, lin: Linearization) -> Vector:
        """The next `v`."""
        g = self.split(lin.gradient)
        factors = self._refreshed(g, lin.examples) if self._places else []
        natural = clipped(self, "kl_clip", self._preconditioned(g, factors), g)
        v = trees.add(trees.scale(self.momentum, trees.values(self._velocity)), natural, -1.0)
        self.taken()
        self.remember(self._velocity, v)
        return self.join(v, lin.gradient)

    def linear_step(self) -> LinearStep:
        """Heavy ball, times the factors of the last step."""

        def preconditioner():
            factors = trees.values(self._factors)
            return self.operator(lambda tiles: self._preconditioned(tiles, factors))

        return LinearStep(heavy_ball(self.momentum), preconditioner, clip_note(self, "kl_clip"))

    def _preconditioned(self, tiles, factors):
        return [
            axes.multiply(axes.multiply_transposed(tile, own), own) for tile, own in zip(tiles, self.by_tile(factors))
        ]

    def _refreshed(self, g, examples):
        """The factors of this step, in the order of `_places`."""

        def compute():
            counts = tf.identity(self._counts.value)
            scale = tf.sqrt(tf.cast(examples, self._dtype))
            of_tiles = zip(self.by_tile(trees.values(self._factors)), self.by_tile(trees.values(self._momenta)))
            pairs = [[[X for X in own if X is not None] for own in each] for each in of_tiles]
            items = [
                (scale * g[i], *pairs[i], count < 0.5) for i, count in zip(self._with_factors, tf.unstack(counts))
            ]
            kept, fine = whole_or_nan([
                tf.nest.flatten(moved) for moved in in_stacks(lambda item: self._rule.moved(*item), items)
            ])  # fmt: skip
            return [*kept, counts + tf.cast(tf.stack(fine), counts.dtype)]

        found = self.refresh([*self._in_order(self._factors, self._momenta), self._counts], self.every, compute)
        kept, K = iter(found), []
        for i in self._with_factors:
            own = [next(kept) for j, _ in self._places if j == i]
            K += own
            _ = [next(kept) for _ in own]  # the momenta
        return K

    def _in_order(self, factors, momenta):
        """For each tile its factors, then their momenta."""
        return [
            X for i in self._with_factors for variables in (factors, momenta)
            for (j, _), X in zip(self._places, variables) if j == i
        ]  # fmt: skip
