"""K-FAC: natural-gradient steps with a Kronecker-factored Fisher matrix."""

from typing import Any, Literal, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_count, check_number, check_part, register
from keras_curvature.linearization.estimates.trace_factors import FACTORS, restricted
from keras_curvature.linearization.fisher.sampling import FISHER
from keras_curvature.linearization.gauss_newton import l2_of, require_convex
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators.kronecker import BlockDiagonal, KroneckerProduct
from keras_curvature.optimizers import adaptive, by_layer
from keras_curvature.optimizers.arguments import with_needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.clipping import clip_note, clipped
from keras_curvature.optimizers.limits import LinearStep, NotLinear, heavy_ball
from keras_curvature.solvers.refresh import Refresh, check_every
from keras_curvature.steps import Damping, LevenbergMarquardt, Trial, as_damping, quadratic
from keras_curvature.typing import Fisher, LearningRate, Sharing, Variables, Vector


@register
class KFAC(CurvatureOptimizer):
    """K-FAC: the gradient of each layer, divided by a Kronecker product close to its block of the Fisher matrix.

        A = E[a a'],  G = E[s s']                 a: inputs of the layer and a 1, s: slopes in its outputs, for labels
                                                  drawn from the model
        A <- eps A_old + (1 - eps) A,  likewise G,               eps = min(1 - 1/t, 0.95) at the t-th time
        d = (A + pi sqrt(lambda) I)^-1  dL/dW  (G + sqrt(lambda)/pi I)^-1,    pi^2 = (tr A / dim A) / (tr G / dim G)

    then, for stochastic training, a step with momentum, limited by `kl_clip`,

        v <- momentum v - min(1, sqrt(kl_clip / (learning_rate^2 d'g))) d,    w <- w + learning_rate v

    or (`momentum=None`), for large batches and hard problems, to the minimum of the quadratic model over the last step
    and this one, with exact Gauss-Newton products `F`,

        v <- -alpha d + mu v,     (alpha, mu) = argmin of g'v + 1/2 v'(F + lambda I) v,     w <- w + learning_rate v

    `KFAC.adaptive()` is the latter, with the damping of Martens. Weights without Kronecker factors get
    `d = g / (diag(F) + lambda)`, and a warning names them. With `factors="tkfac"` (TKFAC)
    `A = E[|s|^2 a a'],  G = E[|a|^2 s s'] / E[|a|^2 |s|^2]`: their product has the trace of the block.

    Reference: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015),
    Algorithm 2; Grosse and Martens (2016) for convolutions; Ba, Grosse and Martens (2017) for the stochastic form; Gao
    et al., "A trace-restricted Kronecker-factored approximation to natural gradient" (2020), whose factors are damped
    by `sqrt(lambda)` each where here `pi` applies.
    Differences from the paper: (1) the damping of the factors is `sqrt(lambda)`, including the L2 regularizer (as in
    kfac-jax), not a second number `gamma` that is searched for; (2) `pi` uses the traces; (3) factors and inverses are
    updated every so many steps, and `t` counts the updates of the factors; (4) the reduction ratio is computed in steps
    `every`, `2 * every`, ..., and its prediction leaves out the damping (as in kfac-jax); (5) with `momentum=None`
    these steps are rejected if they increase the loss of their batch, and the next `v` uses the last accepted step (as
    in kfac-jax); (6) if products also use a part of the batch, every step is checked, by one more forward pass, and
    each rejection increases the damping: only `lambda` limits the step in the null space of the part; (7) a non-finite
    factor or inverse is discarded, the old value kept, and not counted in `t`; (8) iterates are not averaged: use
    Keras' `use_ema=True`.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `0.01`; for `momentum=None`, 1 is the minimum.
        damping: `lambda`, a number, or a component. Defaults to `0.03`, for losses about the size of 1.
        momentum: Factor on the last step; with `None` the quadratic model chooses it and the length of the new
            direction. Defaults to `0.9`.
        factors_every: Steps between two updates of the factors. Defaults to `10`.
        inverses_every: Steps between two inversions, or a `Refresh`: each layer's inverses are computed anew where the
            trace of a factor, or the damping, has changed. The replicas share the work. Defaults to `100`.
        fisher: `"sampled"`: labels drawn from the model; `"exact"`: all possible labels, weighted (one backward pass
            for each class); `"empirical"`: the true labels. Defaults to `"sampled"`.
        sharing: `"expand"` or `"reduce"`: whether positions at which a layer uses the same weights (pixels, tokens)
            count as examples, or are summed first; see `layers/kronecker.py`. Defaults to `"expand"`.
        kl_clip: Largest `learning_rate^2 d'g`, or `None`; weights without Kronecker factors count too. It acts only if
            `d'g > kl_clip / learning_rate^2`, 10 by default. No effect with `momentum=None`. Defaults to `1e-3` (Ba et
            al.).
        curvature_batch: Part of the batch that factors and products use, another part in each step: a share in (0, 1],
            a number of examples, or `None` for all. With `momentum=None`, choose parts with several times more outputs
            (examples times classes) than weights; with smaller parts, start with more damping. Defaults to `None`
            (Martens and Grosse: 1/8 and 1/4).
        factors: `"kfac"` or `"tkfac"`; see `linearization/estimates/trace_factors.py`. Defaults to `"kfac"`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping`, `failed_refreshes` (factors and inverses that were not finite), `step_norm`, `skipped_steps`;
    where they are used `refreshes` (layers with new inverses, with a `Refresh`), `kl_clip` (the multiple of `d`),
    `reduction_ratio` (at the checks), and with `momentum=None` `alpha`, `mu` and `rejected_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.KFAC(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs(layers=True)
    reports = {
        "damping": "last", "kl_clip": "mean", "alpha": "mean", "mu": "mean", "reduction_ratio": "mean",
        "rejected_steps": "sum", "failed_refreshes": "sum", "refreshes": "sum", "step_norm": "mean",
        "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 0.01, damping: float | Damping = 0.03, momentum: float | None = 0.9,
        factors_every: int = 10, inverses_every: int | Refresh = 100, fisher: Fisher = "sampled",
        sharing: Sharing = "expand", kl_clip: float | None = 1e-3, curvature_batch: float | None = None,
        factors: Literal["kfac", "tkfac"] = "kfac", name: str = "kfac", **kwargs: Any,
    ) -> None:  # fmt: skip
        rule, free = as_damping(self, damping), momentum is None
        # only the damping limits the step in the null space of a part of the batch, so every step is checked
        watches = free and curvature_batch is not None
        trial = Trial(rule, accepts="lower" if free else "any", at="last", always=watches)
        there = {"kl_clip": not free and kl_clip is not None, "alpha": free, "mu": free, "reduction_ratio": trial.looks}
        there |= {"rejected_steps": free and trial.looks, "refreshes": isinstance(inverses_every, Refresh)}
        needs = Needs(layers=True, products=free or bool(rule.every))
        super().__init__(learning_rate, name=name, **with_needs(kwargs, needs))
        self.reports = {n: how for n, how in type(self).reports.items() if there.get(n, True)}
        self.damping, self.momentum, self.fisher, self.sharing = damping, momentum, fisher, sharing
        self.factors_every, self.inverses_every = factors_every, inverses_every
        self.kl_clip, self.curvature_batch, self.factors = kl_clip, curvature_batch, factors
        self._rule, self._trial = rule, trial
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True, or_none=True)
        check_count(self, "factors_every", factors_every)
        check_every(self, "inverses_every", inverses_every)
        check_choice(self, "fisher", fisher, FISHER)
        check_choice(self, "sharing", sharing, kronecker.SHARING)
        check_number(self, "kl_clip", kl_clip, low=0, open_low=True, or_none=True)
        check_part(self, "curvature_batch", curvature_batch)
        check(self, "factors", factors, isinstance(factors, str) and factors in FACTORS, '"kfac" or "tkfac"')

    @classmethod
    def adaptive(
        cls, learning_rate: LearningRate = 1.0, damping: float | Damping | None = None, factors_every: int = 5,
        inverses_every: int | Refresh = 20, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """The form of Martens and Grosse (2015), for large batches and hard problems.

        Args:
            learning_rate: Multiple of the step to the minimum of the quadratic model. Defaults to `1.0`.
            damping: A number or component. Defaults to `LevenbergMarquardt(initial=1e-3, decay=19/20, low=1/4,
                high=3/4, every=5, minimum=1e-8)`: the paper's rule, which begins at 150 for losses that sum over the
                pixels. Damping scales with the loss; too much costs more steps than too little.
            factors_every: Defaults to `5` (the paper: 1).
            inverses_every: Defaults to `20`.
            **kwargs: As of the class; `momentum` is `None`. With `curvature_batch=0.25`, factors and products use a
                quarter of each batch, which makes steps of large batches cheaper.

        Example: `KFAC.adaptive(damping=LevenbergMarquardt.martens(1e-5, decay=0.95, every=5), curvature_batch=0.25)`
        """
        if damping is None:
            damping = LevenbergMarquardt(1e-3, decay=19 / 20, low=0.25, high=0.75, every=5, minimum=1e-8)
        chosen = {"momentum": None, "factors_every": factors_every, "inverses_every": inverses_every}
        return cls(learning_rate, damping, **{**chosen, **kwargs})

    def create_state(self, variables: Variables) -> None:
        """Factors and what is made of them, the last step, and the damping."""
        self._blocks, self._diagonal, _ = kronecker.blocks(self.trained_model(), self.sharing)
        by_layer.warn_of(self, self.trained_model(), self._diagonal, "the diagonal of the Fisher matrix")
        self._velocity = self.add_optimizer_variables(variables, "velocity")
        self._damping = self.add_scalar(self._rule.initial, "damping")
        self._factors = by_layer.create_factors(self, self._blocks, "factor")
        self._diagonals = [by_layer.ones(self, variables[i], f"diagonal_{i}") for i in self._diagonal]
        self._counts = self.add_variable((len(self._factors + self._diagonals),), name="looks", aggregation="none")
        self._create_inverses()

    def direction(self, lin: Linearization) -> Vector:
        """The next `v`."""
        g, v, damping = lin.gradient, trees.values(self._velocity), tf.identity(self._damping.value)
        batch = lin if self.curvature_batch is None else lin.chunk(self.curvature_batch, self.iterations)
        natural = self._inverse(batch, damping) @ g
        take = self._with_momentum if self.momentum is not None else self._at_the_minimum
        step, predict = take(lin, batch, natural, v, damping)
        self.remember(self._velocity, self._check(lin, step, v, damping, predict))
        self.report(damping=damping)
        return step

    # How far.

    def _with_momentum(self, lin, batch, natural, v, damping):
        """`(momentum v - nu d, its predicted change of the loss as a function)`."""
        rate = tf.convert_to_tensor(self.learning_rate)
        limited = clipped(self, "kl_clip", natural, lin.gradient)
        step = trees.add(trees.scale(self.momentum, v), limited, -1.0)

        def predict():
            taken = trees.scale(rate, step)
            slope = trees.dot(lin.gradient, taken)
            return slope + 0.5 * tf.cast(batch.gauss_newton().quadratic_form(taken, taken), slope.dtype)

        return step, predict

    def _at_the_minimum(self, lin, batch, natural, v, damping):
        """`(-alpha d + mu v, its predicted change of the loss as a function)`."""
        F = batch.gauss_newton()
        require_convex(F, type(self).__name__, "Choose another loss, or a fixed `momentum`.")
        A = F.gram(F.push(natural), F.push(v))
        crossed = trees.dot(natural, v)
        squares = tf.stack([[trees.squared_norm(natural), crossed], [crossed, trees.squared_norm(v)]])
        b = tf.stack([trees.dot(lin.gradient, natural), trees.dot(lin.gradient, v)])
        A = tf.cast(A, b.dtype)
        c = quadratic.minimize(A + tf.cast(damping, b.dtype) * squares, b)
        self.report(alpha=-c[0], mu=c[1])
        rate = tf.cast(self.learning_rate, b.dtype)
        return trees.add(trees.scale(c[0], natural), v, c[1]), lambda: quadratic.value(A, b, rate * c)

    def _check(self, lin, step, v, damping, predict):
        """The next velocity, after a look at the loss of the step, where one is due."""
        if not self._trial.looks:
            return step
        rate = tf.convert_to_tensor(self.learning_rate)
        checked = self._trial.check(
            self.iterations, damping, before=lin.loss, after=lambda: lin.loss_at(trees.scale(rate, step)),
            predicted=predict,
        )  # fmt: skip
        rejected = tf.logical_not(checked.accepted)
        self.remember(self._damping, checked.value)
        self.report(reduction_ratio=checked.ratio, rejected_steps=tf.cast(rejected, tf.float32))
        if self.momentum is not None:
            return step
        self.reject(rejected)
        return tf.cond(rejected, lambda: v, lambda: step)

    def linear_step(self) -> LinearStep | NotLinear:
        """With a fixed `momentum` heavy ball, times the inverse of the last step; else none."""
        if self.momentum is None:
            return NotLinear(
                f"`{type(self).__name__}` with `momentum=None` sets the length of each step, and its momentum, by the "
                "curvature of the batch: it takes curvature into account, however large. Watch its `reduction_ratio` "
                "and `damping`."
            )
        return LinearStep(heavy_ball(self.momentum), self._kept_inverse, clip_note(self, "kl_clip"))

    # The inverse of the Fisher matrix.

    def _inverse(self, batch, damping):
        """An operator."""
        factors, diagonals = self._refreshed_factors(batch)
        operators = self._inverse_operators(batch, factors, damping)
        return self._side_by_side(operators, diagonals, batch.l2, damping)

    def _kept_inverse(self):
        """The operator of the last step."""
        l2, damping = l2_of(self.trained), tf.identity(self._damping.value)
        return self._side_by_side(self._kept_operators(l2, damping), trees.values(self._diagonals), l2, damping)

    def _side_by_side(self, operators, diagonals, l2, damping):
        damped = {i: d + self._damping_of(l2, [i], damping, d) for i, d in zip(self._diagonal, diagonals)}
        return BlockDiagonal(self._blocks, operators, {i: 1.0 / entries for i, entries in damped.items()})

    def _inverse_operators(self, batch, factors, damping):
        """One for each block."""
        dampings = [self._damping_of(batch.l2, b.variables, damping, A) for b, A in zip(self._blocks, factors[::2])]

        def weighed():
            return restricted(self._blocks, factors) if self.factors == "tkfac" else factors

        if isinstance(self.inverses_every, Refresh) and self._blocks:
            inverses = adaptive.inverses(self, self._blocks, weighed, dampings, self._inverses, self._last)
        else:
            inverses = self.refresh(
                self._inverses, self.inverses_every, lambda: by_layer.inverses(self._blocks, weighed(), dampings)
            )
        return [KroneckerProduct(*pair) for pair in by_layer.pairs(inverses)]

    def _kept_operators(self, l2, damping):
        return [KroneckerProduct(*pair) for pair in by_layer.pairs(trees.values(self._inverses))]

    def _damping_of(self, l2, indices, damping, like):
        """The damping of some weights of one layer: with the L2 regularizer, where the kernel has one."""
        return tf.cast(damping, like.dtype) + max(l2[i] for i in indices)

    def _refreshed_factors(self, batch):
        """`([A, G, A, G, ...], [diagonal])`, each averaged over the looks at it that were finite."""
        variables = [*self._factors, *self._diagonals, self._counts]
        *values, _ = self.refresh(variables, self.factors_every, lambda: self._look(batch, self._seed))
        return values[: len(self._factors)], values[len(self._factors) :]

    @property
    def _seed(self):
        """What the labels of this step are drawn by."""
        return tf.cast(self.iterations, tf.int32)

    def _look(self, batch, seed):
        """`[A, G, A, G, ..., diagonals, looks]` after one more look."""
        counts = tf.identity(self._counts.value)
        found, diagonals = FACTORS[self.factors](batch, self._blocks, self._diagonal, self.fisher, seed)
        new = [*(factor for pair in found for factor in pair), *diagonals]
        averages, fine = by_layer.averaged(self._factors + self._diagonals, new, counts)
        return [*averages, counts + tf.cast(fine, counts.dtype)]

    def _create_inverses(self):
        self._inverses = by_layer.create_factors(self, self._blocks, "inverse")
        if isinstance(self.inverses_every, Refresh):
            self._last = adaptive.create_last(self, self._blocks)
