"""SINGD: K-FAC whose inverses are learnt by matrix products alone."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice, check_count, check_flag, check_number, register
from keras_curvature.linearization.fisher.sampling import FISHER
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function
from keras_curvature.operators.kronecker import BlockDiagonal, from_left, times
from keras_curvature.optimizers import by_layer
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.clipping import clip_note, clipped, set_clip
from keras_curvature.optimizers.limits import LinearStep, heavy_ball
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.solvers.inverse_free import InverseFree
from keras_curvature.typing import Fisher, LearningRate, Sharing, Variables, Vector


@register
class SINGD(CurvatureOptimizer):
    """SINGD: factors `K` and `C` with `K K' ~ A^-1`, `C C' ~ G^-1`, moved towards them by products alone.

    The length of a step is inversely proportional to the scale of the loss: scale regression targets to a variance
    near 1.

        H_K = K'A K,  H_C = C'G C                                A, G: as in `KFAC`, of this batch, every so many steps
        M_K <- alpha M_K + 1/2 (tr(H_C)/d_C H_K + damping tr(C'C)/d_C K'K - I),    likewise M_C
        K <- K - rate K M_K / max(1, |M_K|)                                        likewise C
        v <- momentum v - nu K K' dL/dW C C',    w <- w + learning_rate v               nu: the limit `kl_clip`

    There is no inverse, root or decomposition that could fail, whatever the rank of the factors. With `traces=False`
    the traces are 1, and `K K'` tends to `(A + damping I)^-1` (IKFAC). With `structure="diagonal"` `K` and `C` are
    diagonals, a few numbers for each layer. Weights without Kronecker factors get `k^2 g`, with `k^2 ~ 1 / (diag(F) +
    damping)` moved in the same way, and a warning names them.

    Reference: Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner and Makhzani, "Structured inverse-free natural
    gradient descent" (2024), Figure 3, and github.com/f-dangel/singd. Differences from that code: (1) `K` and `C` begin
    as the multiples of the identity that fit the first batch (there: the identity, which takes thousands of steps to
    shrink); (2) a change is bounded by the Frobenius norm of `M`, always (there: by its largest entry, on request);
    (3) labels may be drawn from the model; (4) of the structures, dense and diagonal ones; (5) weight decay is Keras',
    not part of `v`; (6) all state is kept in float32 at least; (7) `kl_clip`, as of `KFAC`; `kl_clip=None` is the
    authors' method, which stopped learning after some ten steps on a small convolutional network.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `1e-3` (the authors).
        damping: Positive. Defaults to `1e-3` (the authors).
        momentum: Factor on the last step. Defaults to `0.9` (the authors).
        alpha: Factor on the old `M`, in [0, 1). Defaults to `0.5` (the authors).
        rate: Length of a change of `K` and `C`, in (0, 1). Defaults to `0.05` (the authors: 0.01).
        every: Steps between two changes of `K` and `C`; the replicas share the work. Defaults to `10` (the authors).
        traces: Whether each factor sees the size of the other one. Defaults to `True` (the authors).
        structure: `"dense"` or `"diagonal"`. Defaults to `"dense"` (the authors).
        fisher: See `KFAC`. Defaults to `"empirical"` (the authors).
        sharing: See `KFAC`. Defaults to `"expand"` (the authors).
        kl_clip: See `KFAC`. Defaults to `1e-4`, with 1.04 to 1.38 of Adam's reduction of the loss in 150 steps on a
            dense and a convolutional network with batches of 32 and 512; without a limit 0.01 on the convolutional one
            (`tuning` data of `examples/benchmarks/defaults.py`).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `kl_clip` (`nu`), `failed_refreshes` (factors that were not finite; the old ones are kept), `step_norm`,
        `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SINGD(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs(layers=True)
    reports = {"kl_clip": "mean", "failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 1e-3, damping: float = 1e-3, momentum: float = 0.9, alpha: float = 0.5,
        rate: float = 0.05, every: int = 10, traces: bool = True, structure: Literal["dense", "diagonal"] = "dense",
        fisher: Fisher = "empirical", sharing: Sharing = "expand", kl_clip: float | None = 1e-4, name: str = "singd",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum, self.alpha, self.rate, self.every = damping, momentum, alpha, rate, every
        self.traces, self.structure, self.fisher, self.sharing = traces, structure, fisher, sharing
        set_clip(self, "kl_clip", kl_clip)
        self._rule = InverseFree(damping, alpha, rate, traces)
        check_number(self, "damping", damping, low=0, open_low=True)
        for argument, factor in (("momentum", momentum), ("alpha", alpha)):
            check_number(self, argument, factor, low=0, high=1, open_high=True)
        check_number(self, "rate", rate, low=0, high=1, open_low=True, open_high=True)
        check_count(self, "every", every)
        check_flag(self, "traces", traces)
        check_choice(self, "structure", structure, ("dense", "diagonal"))
        check_choice(self, "fisher", fisher, FISHER)
        check_choice(self, "sharing", sharing, kronecker.SHARING)

    def create_state(self, variables: Variables) -> None:
        """The last step; `K, C, M_K, M_C` of each block and `k, m` of each other weight, and how often they changed."""
        self._blocks, self._others, _ = kronecker.blocks(self.trained_model(), self.sharing)
        by_layer.warn_of(self, self.trained_model(), self._others, "the diagonal of the Fisher matrix")
        self._velocity = self.add_optimizer_variables(variables, "velocity")
        self._factors = [v for i, block in enumerate(self._blocks) for v in self._of_block(i, block)]
        self._diagonals = [
            self.add_variable(variables[i].shape, dtype=variables[i].dtype, name=f"{name}_{i}", aggregation="none")
            for i in self._others for name in ("k", "m")
        ]  # fmt: skip
        self._counts = self.add_variable((len(self._blocks) + len(self._others),), name="looks", aggregation="none")

    def _of_block(self, i, block):
        shapes = [
            shape[:-1] if self.structure == "diagonal" and kind == "matrix" else shape
            for shape, kind in zip(block.factor_shapes, block.kinds)
        ]
        dtype = tf.as_dtype(block.dtype).name
        return [
            self.add_variable(shape, "zeros", dtype, name=f"{name}_{i}", aggregation="none")
            for names in ("KC", ("M_K", "M_C")) for name, shape in zip(names, shapes)
        ]  # fmt: skip

    def direction(self, lin: Linearization) -> Vector:
        """The next `v`."""
        values = self._refreshed(lin)
        natural = clipped(self, "kl_clip", self._operator(values) @ lin.gradient, lin.gradient)
        step = trees.add(trees.scale(self.momentum, trees.values(self._velocity)), natural, -1.0)
        self.remember(self._velocity, step)
        return step

    def linear_step(self) -> LinearStep:
        """Heavy ball, times the factors of the last step."""
        def preconditioner():
            return self._operator(trees.values([*self._factors, *self._diagonals]))

        return LinearStep(heavy_ball(self.momentum), preconditioner, clip_note(self, "kl_clip"))

    def _operator(self, values):
        of_blocks = [values[4 * i : 4 * i + 2] for i in range(len(self._blocks))]
        k = values[4 * len(self._blocks) :: 2]
        operators = [_squared(*pair) for pair in of_blocks]
        return BlockDiagonal(self._blocks, operators, {i: tf.square(x) for i, x in zip(self._others, k)})

    def _refreshed(self, lin):
        """`[K, C, M_K, M_C, ..., k, m, ...]`."""
        variables = [*self._factors, *self._diagonals]
        old = trees.values(variables)

        def compute():
            counts = tf.identity(self._counts.value)
            first = [count < 0.5 for count in tf.unstack(counts)]
            seed = tf.cast(self.iterations, tf.int32)
            pairs, diagonals = lin.kronecker_factors(self._blocks, self._others, self.fisher, seed)
            groups = self._moved(pairs, old[: len(self._factors)], first)
            pieces = list(zip(*[iter(old[len(self._factors) :])] * 2))
            groups += [
                self._rule.moved_entries(f, *piece, start)
                for f, piece, start in zip(diagonals, pieces, first[len(self._blocks) :])
            ]
            kept, fine = by_layer.whole_or_nan(groups)
            return [*kept, counts + tf.cast(tf.stack(fine), counts.dtype)]

        if not variables:
            return []
        *values, _ = self.refresh([*variables, self._counts], self.every, compute)
        return values

    def _moved(self, pairs, old, first):
        """The next `(K, C, M_K, M_C)` of each block; small blocks of one shape together."""
        grouped = [len(block.shape) == 3 for block in self._blocks]
        items = [
            (*pair, *old[4 * i : 4 * i + 4], tf.fill(block.shape[:1], start) if has_groups else start)
            for i, (pair, block, start, has_groups) in enumerate(zip(pairs, self._blocks, first, grouped))
        ]

        return in_stacks(lambda item: self._rule.moved(*item), items, grouped, largest=by_layer.STACKED)


def _squared(K, C):
    """`[W] -> [K K' W C C']`."""

    def product(matrices):
        (W,) = matrices
        W = from_left(K, from_left(_transposed(K, W), W))
        return [times(times(W, C), _transposed(C, W))]

    return Function(product, psd=True)


def _transposed(X, W):
    return tf.linalg.matrix_transpose(X) if X.shape.rank == W.shape.rank else X
