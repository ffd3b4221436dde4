"""Shampoo: the gradient multiplied along each axis by the inverse root of its second moment."""

import functools
from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_component, check_count, check_number, register
from keras_curvature.operators import axes
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.optimizers.limits import LinearStep, NotLinear, averaged
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.solvers.refresh import Refresh, check_every
from keras_curvature.solvers.roots import CoupledNewton, EigenRoot
from keras_curvature.solvers.rounding import rounded_at_random
from keras_curvature.solvers.running_roots import RunningRoot
from keras_curvature.typing import LearningRate, Variables, Vector

STACKED = 2**20  # larger gradients are not copied into a stack with others
# Of the grafted step (the reference's example scripts; Keras' own Adam has 1e-7).
GRAFTING_EPSILON = 1e-8


@register
class Shampoo(ByAxis):
    """Shampoo: a full-matrix preconditioner for each axis of a weight, and the length of another method's step.

        L <- beta_2 L + (1 - beta_2) G G',    R <- beta_2 R + (1 - beta_2) G' G,    M <- beta_1 M + (1 - beta_1) G
        P = (L^ + epsilon I)^(-1/4) M^ (R^ + epsilon I)^(-1/4)
        w <- w - learning_rate P |grafted step| / |P|

    with the hats for Adam's bias corrections. A tensor of `k` axes has `k` factors and the exponent `-1 / (2k)`; a
    vector, such as a bias, one, and `-1/2`. The roots are computed in each `every`-th step; until the first of them the
    grafted step itself is taken (`grafting=None`: the momentum).

    `sides="shortest"` is ASGO (An et al., "ASGO: Adaptive structured gradient optimization", 2025), or, with grafting,
    one-sided Shampoo. Differences of ASGO from the authors' code: there each step is scaled to entries of 0.2 in the
    mean, and a square kernel has the factor of its inputs (here: of its outputs).

    Reference: Gupta, Koren and Singer, "Shampoo: Preconditioned stochastic tensor optimization" (2018), Algorithms 1
    and 2; Anil et al., "Scalable second order optimization for deep learning" (2020), for blocks (here: tiles),
    grafting and delayed roots; and the code of Shi et al., "A distributed data-parallel PyTorch implementation of the
    distributed Shampoo optimizer" (2023). Differences from the first: (1) long axes are cut into tiles of at most
    `block_size`, each with its own factors; (2) grafting, averages and momentum, as in the last; the first
    has `beta_2=1, beta_1=0, grafting=None`.
    Differences from the last: (3) axes are merged from the front, where Keras' kernels have their small axes, and
    never down to one: a 3x3 kernel of 16 by 32 channels is a 144 by 32 matrix; (4) the averages of the grafted step
    have the decay `beta_2`; (5) one-sided: an axis longer than `max_dimension` has no factor, and the exponent counts
    the axes that have one; (6) a failed root is reported and the old one kept; their code raises an error after three
    failures; (7) weight decay is Keras': before the step.

    Args:
        learning_rate: The learning rate of the grafted method. Defaults to `1e-3` (Adam's).
        beta_1: Decay of the momentum. Defaults to `0.9` (Shi et al.).
        beta_2: Decay of the factors, and of the grafted method's second moment; `1`: sums. Defaults to `0.999` (Shi et
            al. with grafting to Adam).
        epsilon: Added to the factors. Defaults to `1e-12` (Shi et al.).
        every: Steps from one root to the next, or a `Refresh`, which keeps a copy of the factors. Defaults to `10`
            (Shi et al.: `1`).
        block_size: Longest axis of a tile, and longest axis that merging may make. Defaults to `512` (Shi et
            al.: 1024, with which the roots of a large matrix take twice as long). The factors and roots of a tile of
            `a` by `b` have `2 (a/b + b/a)` numbers for each of its weights: 4 if it is square, and 16 if an embedding
            of 20000 by 64 is cut into tiles of 512 by 64. A smaller `block_size` or a `max_dimension` saves memory.
        max_dimension: Longest axis (before the cut) with factors; `None`: no limit. Defaults to `None`. With
            `max_dimension=1000` that embedding has factors only for its 64 columns, 0.3 numbers for each weight.
        grafting: The method that sets the length of each tile's step: `"adam"`, `"rmsprop"` (Adam without the bias
            correction of its second moment), `"sgd"`, or `None`. Defaults to `"adam"`.
        root: `EigenRoot` or `CoupledNewton`, with an optional other exponent for tensors with two or more factors; or a
            root without factors, which sees the gradients of every `every`-th step only: `SketchedRoot` (Sketchy), of
            low rank, or `BinomialRoot` (Jorge), by products. Defaults to `EigenRoot()`.
        sides: `"all"`, or `"shortest"`: one factor for each tile, of its shortest axis, with the exponent `-1/2`
            (one-sided Shampoo; with `grafting=None` ASGO). It has about half the cost. Defaults to `"all"`.
        factors_dtype: `"float32"`, or `"bfloat16"`: factors and roots are stored in half the memory. All arithmetic is
            in float32. The factors are rounded up or down at random, because a step changes them by less than what
            bfloat16 resolves. Defaults to `"float32"`, which means float64 beside weights in float64.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (failed roots; the old ones are kept), `refreshes` (with a `Refresh`: changed roots),
        `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.Shampoo(), loss="mse")
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 1e-3, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-12,
        every: int | Refresh = 10, block_size: int = 512, max_dimension: int | None = None,
        grafting: Literal["adam", "rmsprop", "sgd"] | None = "adam",
        root: EigenRoot | CoupledNewton | RunningRoot = EigenRoot(),
        sides: Literal["all", "shortest"] = "all", factors_dtype: Literal["float32", "bfloat16"] = "float32",
        name: str = "shampoo", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        check_number(self, "beta_1", beta_1, low=0, high=1, open_high=True)
        check_number(self, "beta_2", beta_2, low=0, high=1, open_low=True)
        check_number(self, "epsilon", epsilon, low=0, open_low=True)
        check_every(self, "every", every)
        check_count(self, "block_size", block_size)
        check_count(self, "max_dimension", max_dimension, or_none=True)
        known = ("adam", "rmsprop", "sgd", None)
        check_choice(self, "grafting", grafting, known)
        method = "updated" if isinstance(root, RunningRoot) else "inverse_root"
        check_component(self, "root", root, method, "EigenRoot()")
        self.beta_1, self.beta_2, self.epsilon, self.every = beta_1, beta_2, epsilon, every
        check_choice(self, "sides", sides, ("all", "shortest"))
        self.block_size, self.max_dimension, self.grafting, self.root = block_size, max_dimension, grafting, root
        named = isinstance(factors_dtype, str) and factors_dtype in ("float32", "bfloat16")  # `tf.bfloat16` equals it
        check(self, "factors_dtype", factors_dtype, named, '"float32" or "bfloat16"')
        half = factors_dtype == "bfloat16"
        self.sides, self.factors_dtype = sides, factors_dtype
        if isinstance(root, RunningRoot):
            check(self, "every", every, isinstance(every, int), f"an integer with `root={type(root).__name__}(...)`")
            check(self, "factors_dtype", factors_dtype, not half, f'"float32" with `root={type(root).__name__}(...)`')
        self.count_refreshes()

    def create_state(self, variables: Variables) -> None:
        """The momentum, the second moment of the grafted method, the factors and their roots."""
        merge = min(self.block_size, self.max_dimension or self.block_size)
        self.create_tiles(variables, merge, self.block_size, self.max_dimension, sides=self.sides)
        self._m = self.add_moments("m") if self.beta_1 else []
        self._v = self.add_moments("v") if self.grafting in ("adam", "rmsprop") else []
        self._factors, self._roots, self._last, self._running = [], [], [], []
        counts = [sum(j == i for j, _ in self._places) for i, _ in self._places]
        self._exponents = [(n > 1 and self.root.exponent) or 1 / (2 * n) for n in counts]
        if isinstance(self.root, RunningRoot):
            self._running = [self._running_state(i, k) for i, k in self._places]
            return

        dtype = None if self.factors_dtype == "float32" else self.factors_dtype
        self._factors = self.add_matrices("factor", dtype=dtype)
        self._roots = self.add_matrices("root", "identity", dtype)
        self._last = [] if isinstance(self.every, int) else self.add_matrices("last", dtype=dtype)

    def _running_state(self, i, k):
        return [
            self.add_variable(shape, initializer, self._dtype, name=f"{name}_{i}_{k}")
            for name, shape, initializer in self.root.state(self._shapes[i][k], self.epsilon)
        ]

    def precondition(self, gradients: Vector) -> Vector:
        """The negative grafted step."""
        G, taken = self.split(gradients), self.taken()
        steps = taken + 1
        roots = self.by_tile((self._updated if self._running else self._renewed)(G, taken))
        M = G
        if self.beta_1:
            m = self.average(self._m, G, self.beta_1)
            self.remember(self._m, m)
            M = trees.scale(1.0 / self.correction(self.beta_1, steps), m)
        P = [axes.multiply(m, root) for m, root in zip(M, roots)]
        return self.join(trees.negative(self._graft(P, M, G, steps)), gradients)

    def linear_step(self) -> LinearStep | NotLinear:
        """An average of gradients, times the roots of the last step; no known limit with grafting."""
        if self.grafting is not None:
            return NotLinear(
                f"`Shampoo` gives each of its steps the length of a step of another method (`grafting="
                f"{self.grafting!r}`): no limit on the curvature is known. With `grafting=None` there is one."
            )
        return LinearStep(averaged(self.beta_1), self._preconditioner)

    def _preconditioner(self):
        taken = tf.identity(self._taken.value)
        values = [trees.values(state) for state in self._running]
        roots = self.by_tile(self._roots_of(values, taken) if values else trees.values(self._roots))
        scale = 1.0 / self.correction(self.beta_1, taken)
        return self.operator(lambda tiles: trees.scale(scale, [axes.multiply(b, r) for b, r in zip(tiles, roots)]))

    def _renewed(self, G, taken):
        """The roots of the factors, which are remembered."""
        moments = [axes.second_moment(G[i], k) for i, k in self._places]
        factors = self.average(trees.values(self._factors), moments, self.beta_2)
        roots = self._refreshed(factors, self.correction(self.beta_2, taken + 1), taken)
        if self.factors_dtype == "bfloat16":
            factors = [rounded_at_random(A, self.iterations, i) for i, A in enumerate(factors)]
        self.remember(self._factors, factors)
        return [tf.cast(root, self._dtype) for root in roots]

    def _updated(self, G, taken):
        """The roots that have no factors, updated from the gradient in every `every`-th step."""
        flat = [v for state in self._running for v in state]

        def compute():
            items = [(*trees.values(v), axes.unfold(G[i], k)) for v, (i, k) in zip(self._running, self._places)]
            found = self._by_exponent(
                items, lambda item, p: self.root.updated(list(item[:-1]), item[-1], self.beta_2, p), largest=STACKED
            )
            return [tensor for state in found for tensor in state]

        new = iter(self.renew(flat, compute, taken, self.period - 1))
        return self._roots_of([[next(new) for _ in state] for state in self._running], taken + 1)

    def _roots_of(self, states, steps):
        correction = self.correction(self.beta_2, tf.maximum(steps // self.period, 1))
        return [
            self.root.root(state, correction, 1 / exponent, self.epsilon)
            for state, exponent in zip(states, self._exponents)
        ]  # fmt: skip

    def _by_exponent(self, items, compute, **kwargs):
        """`compute(item, p)` of each axis, those with one exponent together."""
        found = {}
        for exponent in sorted(set(self._exponents)):
            chosen = [i for i, other in enumerate(self._exponents) if other == exponent]
            one = functools.partial(compute, p=1 / exponent)
            found.update(zip(chosen, in_stacks(one, [items[i] for i in chosen], **kwargs)))
        return [found[i] for i in range(len(items))]

    def _refreshed(self, factors, correction, taken):
        old, last = trees.values(self._roots), trees.values(self._last)

        def root(A, p):
            return self.root.inverse_root(A, p, self.epsilon)

        def looked_at(item, p):
            return self.every.root(functools.partial(root, p=p), *item)

        def compute():
            matrices = [A / correction for A in factors]
            if not last:
                return self._by_exponent(matrices, root)
            pairs = self._by_exponent(list(zip(matrices, old, last)), looked_at)
            return [*(X for X, _ in pairs), *(A for _, A in pairs)]

        if not factors:
            return []
        new = self.renew([*self._roots, *self._last], compute, taken, self.period - 1)[: len(factors)]
        self._report_refreshes(old, new)
        return new

    def _graft(self, P, M, G, steps):
        """Each tile, scaled to the norm of the grafted step's tile; until the first roots, the grafted step itself."""
        if self.grafting is None:
            return P
        grafted = M
        if self.grafting != "sgd":
            v = self.average(self._v, [g * g for g in G], self.beta_2)
            self.remember(self._v, v)
            correct = self.correction(self.beta_2, steps) if self.grafting == "adam" else tf.ones((), self._dtype)
            scale = tf.math.rsqrt(correct)
            grafted = [m / (scale * tf.sqrt(v_) + GRAFTING_EPSILON) for m, v_ in zip(M, v)]
        lengths = [trees.norm([a]) / (trees.norm([p]) + 1e-16) for a, p in zip(grafted, P)]
        scaled = [length * p for length, p in zip(lengths, P)]
        return trees.where(steps >= self.period, scaled, grafted) if self.period > 1 else scaled
