"""The Neumann optimizer: gradients at displaced weights, for large batches."""

import warnings
from typing import Any, Self

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check, check_count, check_number, register
from keras_curvature.linearization.gradients import Gradients
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import LinearStep, nesterov
from keras_curvature.typing import LearningRate, Scalar, Tensors, Variables, Vector


@register
class Neumann(CurvatureOptimizer):
    """The Neumann optimizer: the Neumann series of the inverse Hessian, one term per step, by gradients alone.

    One gradient at weights displaced by `m` gives the product `H m` in the series `m <- m - (g + eta H m)`. After
    `warmup_steps` of plain SGD, at step `t` with gradient `G` at the stored (displaced) weights `w`:

        t a reset:   m <- -eta G                                           w and v stay
        else:        d = G + (alpha r^2 - beta n / r^2) (w - v) / r,       r = |w - v| over all weights
                     m <- mu(t) m - eta d
                     w <- w + mu(t) m - eta d                              (the new m)
                     v <- w + gamma (v - w)                                (the new w)

    with `n` the number of weights and `mu(t) = min(mu_end, 1 - 1 / (t + 1 / (1 - mu_start) - 1))`. The solution is
    `w - mu m`. Costs one gradient per step, as SGD, and two copies of the weights. With `alpha = beta = 0`,
    `mu_start = mu_end` and no reset it is SGD with Nesterov momentum.

    Where the solution is: on a plain `keras.Model` the stored weights are the displaced ones while `fit` runs; at its
    end `finalize_variable_values` leaves `w - mu m`. `keras_curvature.callbacks.SwapNeumannWeights` also does this for
    validation and checkpoints. With it a further `fit` continues exactly; without it the first gradient of a further
    `fit` is at `w - mu m`. On a curved model (`keras_curvature.curved`) the weights are always the solution.

    Reference: Krishnan, Xiao and Saurous, "Neumann Optimizer: A Practical Optimization Algorithm for Deep Neural
    Networks" (ICLR 2018), Algorithm 2 and Table 1. Differences from the paper: (1) the repulsion `beta n / r^2` is
    infinite at `r = 0`; here it falls linearly to zero below a tenth of its equilibrium radius
    `r* = (eta beta n / ((1 - mu_end) (1 - gamma)))^(1/3)`; (2) the paper does not state the unit of `t` in `mu(t)`;
    here it is steps since the warm-up; (3) resets are at `t = 1`, `1 + K`, `1 + 3 K`, `1 + 7 K`, ... for
    `K = reset_every` and growth 2; with `reset_every=None` there is no reset, and at `t = 1` `m` is the last step of
    the warm-up, `-eta G`; (4) the paper counts warm-up and resets in epochs (5 and 10), as `from_epochs` does; the
    defaults in steps and of the learning rate, which the paper tunes, are this package's.

    Args:
        learning_rate: `eta`; a float, schedule or callable. As SGD does, it diverges with `eta` above 2 / sharpness, as
            with regression targets far above 1. Choose an `eta` at which SGD is stable;
            `keras_curvature.curvature(model, data).top(1)` measures the sharpness. Defaults to `0.05`.
        alpha: Weight of the cubic regularizer `alpha/3 |w - v|^3`. Defaults to `1e-7` (Table 1).
        beta: Weight of the repulsion `beta n / |w - v|`, times the number of weights. Defaults to `1e-5` (Table 1). It
            keeps the weights `r*` away from `v`, so they move by `r* (1 - gamma)` per step while the learning rate
            stays constant. This bounds the training loss of small networks from below. Let the learning rate decay, or
            lower `beta`.
        gamma: Decay of the moving average `v`, in [0, 1). Defaults to `0.99` (Table 1).
        mu_start: Momentum at `t = 1`, in [0, 1). Defaults to `0.5` (Table 1).
        mu_end: Largest momentum, in [`mu_start`, 1). Defaults to `0.9` (Table 1).
        warmup_steps: Steps of SGD at the beginning, whose length nothing limits. Defaults to `10`: on small networks
            1.01 or more of Adam's reduction of the loss in 150 steps, and 0.06 to 1.1 with 1000 (`tuning` data of
            `examples/benchmarks/defaults.py`).
        reset_every: `K`, steps until the second reset; `None`: no resets. Defaults to `None`.
        reset_growth: Factor on `K` after every reset, an integer. Defaults to `2`.
        **kwargs: See `CurvatureOptimizer`. Clipping breaks the displacement; the paper advises against it.

    Reports: `mu`, `skipped_steps` (on a curved model; on any, `optimizer.skipped_steps`).

    Example:

    ```python
    model.compile(optimizer=keras_curvature.Neumann(0.05), loss="mse")
    model.compile(optimizer=keras_curvature.Neumann.from_epochs(steps_per_epoch=400, learning_rate=0.05), loss="mse")
    ```
    """

    reports = {"mu": "last", "skipped_steps": "sum"}
    needs = Needs(only_gradients=True, shifted=True)

    def __init__(
        self, learning_rate: LearningRate = 0.05, alpha: float = 1e-7, beta: float = 1e-5, gamma: float = 0.99,
        mu_start: float = 0.5, mu_end: float = 0.9, warmup_steps: int = 10, reset_every: int | None = None,
        reset_growth: int = 2, name: str = "neumann", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.alpha, self.beta, self.gamma, self.mu_start, self.mu_end = alpha, beta, gamma, mu_start, mu_end
        self.warmup_steps, self.reset_every, self.reset_growth = warmup_steps, reset_every, reset_growth
        check_number(self, "alpha", alpha, low=0)
        check_number(self, "beta", beta, low=0)
        for key, given in (("gamma", gamma), ("mu_start", mu_start), ("mu_end", mu_end)):
            check_number(self, key, given, low=0, high=1, open_high=True)
        check(self, "mu_end", mu_end, mu_end >= mu_start, f"at least `mu_start` ({mu_start})")
        check_count(self, "warmup_steps", warmup_steps, low=0)
        check_count(self, "reset_every", reset_every, low=2, or_none=True)
        check_count(self, "reset_growth", reset_growth)
        clips = {name: getattr(self, name) for name in ("clipnorm", "clipvalue", "global_clipnorm")}
        if any(clips.values()):
            warnings.warn(
                "`Neumann` measures curvature by gradients at displaced weights, and its authors report that it does "
                f"not work with clipped gradients. Received: {', '.join(f'{k}={v}' for k, v in clips.items() if v)}. "
                "Train without clipping.",
                stacklevel=2,
            )
        self._stores_base = False
        self._mode: Any = None

    @classmethod
    def from_epochs(
        cls, steps_per_epoch: int, warmup_epochs: float = 5, reset_epochs: float | None = 10, **kwargs: Any
    ) -> Self:  # fmt: skip
        """The optimizer with its periods in epochs, as in the paper.

        Args:
            steps_per_epoch: Batches per epoch, a positive integer.
            warmup_epochs: Epochs of SGD. Defaults to `5` (Table 1).
            reset_epochs: Epochs until the second reset; `None`: no resets. Defaults to `10` (Table 1).
            **kwargs: Arguments of the constructor.
        """
        check_count(cls, "steps_per_epoch", steps_per_epoch)
        check_number(cls, "warmup_epochs", warmup_epochs, low=0)
        check_number(cls, "reset_epochs", reset_epochs, low=0, open_low=True, or_none=True)
        reset_every = None if reset_epochs is None else round(reset_epochs * steps_per_epoch)
        return cls(warmup_steps=round(warmup_epochs * steps_per_epoch), reset_every=reset_every, **kwargs)

    def create_state(self, variables: Variables) -> None:
        """`m`, `v` (which the first step puts at the weights), the next reset and the period after it."""
        self._m = self.add_optimizer_variables(variables, "m")
        self._v = self.add_optimizer_variables(variables, "v")
        counter: dict[str, Any] = {"shape": (), "dtype": "int", "aggregation": "none"}
        self._next_reset = self.add_variable(initializer="ones", name="next_reset", **counter)
        period = keras.initializers.Constant(self.reset_every or 0)
        self._period = self.add_variable(initializer=period, name="reset_period", **counter)
        # 1 where the stored weights are the displaced w, 0 where they are the solution w - mu m
        self._displaced = self.add_scalar(0.0, "displaced")
        self._count = trees.count(variables)

    # The schedule.

    @property
    def _t(self):
        """Steps since the warm-up, from 1 on; not positive during it. An integer scalar."""
        return tf.cast(self.iterations, tf.int64) - self.warmup_steps + 1

    def _mu(self, t):
        """`mu(t)`; zero during the warm-up."""
        ramp = 1.0 - 1.0 / (tf.cast(tf.maximum(t, 1), tf.float64) + 1.0 / (1.0 - self.mu_start) - 1.0)
        # the cap also takes off the rounding of the ramp, so that mu_start == mu_end is that number exactly
        return tf.where(t < 1, tf.zeros_like(ramp), tf.clip_by_value(ramp, self.mu_start, self.mu_end))

    def linear_step(self) -> LinearStep:
        """Nesterov's momentum `mu(t)`, at the displaced weights."""
        note = "The forces `alpha` and `beta` towards and from the average of the weights are left out of the limit."
        return LinearStep(nesterov(float(self._mu(self._t))), note=note if self.alpha or self.beta else None)

    def shift(self) -> Vector:
        """`mu m`: from the stored weights to the displaced ones, where the gradient belongs."""
        return trees.scale(self._back(self._t), trees.values(self._m))

    def _back(self, t):
        """`mu` of the step before, if the stored weights are the solution; zero if they are the displaced ones."""
        return self._mu(t - 1) * (1.0 - tf.cast(self._displaced.value, tf.float64))

    def step(self, linearization: Linearization | Gradients, overwriting: Tensors = ()) -> dict[str, tf.Tensor]:
        """One step; on a curved model the stored weights are the solution, on a plain one the displaced weights."""
        self._stores_base = isinstance(linearization, Linearization)
        mu = self._mu(self._t)
        return {"mu": tf.cast(mu, tf.float32), **super().step(linearization, overwriting)}

    # Keras calls `_distributed_tf_update_step` once per step, with summed gradients, and `update_step` per variable.

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        t, first = self._t, tf.equal(self.iterations, 0)
        if keras_internals.is_compiled():
            self._begin(t, first)  # XLA joins it with the update; a condition would copy weights and `v` in each step
        else:  # rarely: at the very first step, and on a plain model at the first of a further `fit`
            due = first if self._stores_base else first | tf.equal(self._displaced.value, 0.0)
            tf.cond(due, lambda: self._begin(t, first), lambda: None)
        # in float64: rounding mu or its powers would show after some hundred steps
        self._mode = mode = self._scalars(t, tf.cast(learning_rate, tf.float64), [v for _, v in grads_and_vars])
        each_variable = super()._distributed_tf_update_step

        def advance(seeding=False):
            self._mode = {**mode, "seeding": seeding}
            each_variable(distribution, grads_and_vars, learning_rate)

        def seed():
            advance(seeding=True)
            self._next_reset.assign_add(self._period.value)
            self._period.assign(self._period.value * self.reset_growth)

        if self.reset_every is None:
            advance()
        else:
            tf.cond(tf.equal(t, tf.cast(self._next_reset.value, t.dtype)), seed, advance)
        self._displaced.assign(0.0 if self._stores_base else 1.0)
        self._mode = None  # tensors of the graph that was traced

    def _begin(self, t, first):
        """Displace the weights of a plain model, if they are the solution; at the first step `v` begins at them."""
        if not self._stores_base:
            self._displace(self._back(t))
        # here and not in `create_state`: an assignment made while Keras traces its first step is lost
        for v, w in zip(self._v, self.trained):
            v.assign(tf.where(first, trees.full_precision(tf.convert_to_tensor(w)), v.value))

    def _scalars(self, t, eta, variables):
        """The numbers that all variables share in this step."""
        warm = t < 1
        back = self._back(t) if self._stores_base else None
        keep = tf.where(warm, tf.constant(1.0, tf.float64), self.gamma)
        mode = {"mu": self._mu(t), "eta": eta, "back": back, "keep": keep, "pull": None, "away": None}
        if self.alpha or self.beta:
            away = [self._current(w, m, back) - v for w, m, v in zip(variables, self._m, self._v)]
            if replicas.count() == 1:
                mode["away"] = away  # on several replicas each takes the difference of its own copies again
            r, repulsion = tf.cast(trees.norm(away), tf.float64), self.beta * self._count
            balance = tf.pow(eta * repulsion / ((1.0 - self.mu_end) * (1.0 - self.gamma)), 1.0 / 3.0)
            pull = self.alpha * r - tf.math.divide_no_nan(
                tf.constant(repulsion, tf.float64), tf.pow(tf.maximum(r, 0.1 * balance), 3.0)
            )
            mode["pull"] = tf.where(warm, tf.zeros_like(pull), pull)
        return mode

    @staticmethod
    def _current(w, m, back):
        """The displaced weights, from the stored ones."""
        w = trees.full_precision(tf.convert_to_tensor(w))
        return w if back is None else w + tf.cast(back, w.dtype) * m

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: Scalar) -> None:
        """Algorithm 2, lines 6-12, for one variable."""
        index = self.place_of(variable)
        m, v, mode = self._m[index].value, self._v[index].value, self._mode
        w = self._current(variable, m, mode["back"])
        mu, eta, keep = (tf.cast(mode[name], w.dtype) for name in ("mu", "eta", "keep"))
        gradient = tf.cast(gradient, w.dtype)
        if mode["seeding"]:
            m.assign(-eta * gradient)
            if self._stores_base:
                variable.assign(tf.cast(w - mu * m, variable.dtype))
            return
        if mode["pull"] is not None:
            away = w - v if mode["away"] is None else mode["away"][index]
            gradient += tf.cast(mode["pull"], w.dtype) * away
        if self._stores_base or w.dtype != variable.dtype:
            step = eta * gradient
            new_m = mu * m - step
            new_w = w + mu * new_m - step
            m.assign(new_m)
            variable.assign(tf.cast(new_w - mu * new_m if self._stores_base else new_w, variable.dtype))
        else:
            # lines 10 and 11 in one pass over the memory
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=variable.handle, accum=m.handle, lr=eta, grad=gradient, momentum=mu, use_nesterov=True
            )
            new_w = variable
        tf.raw_ops.ResourceApplyGradientDescent(var=v.handle, alpha=1.0 - keep, delta=v - new_w)

    # Where the solution is, on a plain model.

    def _displace(self, mu):
        """Stored weights `w - mu m` become `w`."""
        for w, m in zip(self.trained, self._m):
            w.assign(self._current(w, m, mu))  # Keras rounds to the weights' precision

    @property
    def is_displaced(self) -> bool:
        """Whether the model's weights are the displaced ones."""
        return self.built and float(self._displaced.numpy()) > 0.0

    def displace(self) -> None:
        """Assign the displaced weights to a plain model that has the solution; do nothing if it has them."""
        if self.built and not self.is_displaced:
            self._displace(self._mu(self._t - 1))
            self.mark_displaced()

    def restore(self) -> None:
        """Assign the solution `w - mu m` to a model that has the displaced weights; do nothing if it has it."""
        if self.is_displaced:
            self._displace(-self._mu(self._t - 1))
            self._displaced.assign(0.0)

    def mark_displaced(self) -> None:
        """Record that the displaced weights were assigned to the model."""
        self._displaced.assign(1.0)

    def finalize_variable_values(self, var_list: Variables) -> None:
        """Keras calls this at the end of `fit`: `return w_T - mu(T) m_T`, or the average where `use_ema` is set."""
        if self.use_ema:
            super().finalize_variable_values(var_list)
            self._displaced.assign(0.0)
        elif self.is_displaced:
            self.restore()
            for w in self.trained:  # Keras has projected the displaced weights
                if getattr(w, "constraint", None) is not None:
                    w.assign(w.constraint(w))
