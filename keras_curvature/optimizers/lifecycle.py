"""The methods of the package's optimizers that Keras calls to build them and to take a step.

`Lifecycle` applies a method's step by Keras' own `apply`: all of it, or nothing if loss or step is not finite.
"""

import warnings
import weakref
from typing import Any

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.linearization.gradients import Gradients, needs_a_curved_model
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers import first_batch, given
from keras_curvature.optimizers.arguments import check_accumulation, check_for_keras
from keras_curvature.optimizers.given import overwrites
from keras_curvature.optimizers.wrappers import WrappedOptimizer
from keras_curvature.typing import LearningRate, Shape, Tensors, Variables


class Lifecycle(WrappedOptimizer):
    """The part of `CurvatureOptimizer` that Keras calls."""

    def __init__(self, learning_rate: LearningRate, needs: Needs | None = None, **kwargs: Any) -> None:
        check_for_keras(self, learning_rate, needs, kwargs)
        super().__init__(learning_rate=learning_rate, **kwargs)
        if needs is not None:
            self.needs = needs
        check_accumulation(self)
        self.check_wrappers(self._steps_each_weight)
        self._noted, self._reported, self._rejected = [], {}, None
        self._hands_a_step, self._unreached, self._model = False, (), lambda: None

    # The step. Under `tf.function` AutoGraph would first translate everything that it calls.

    @tf.autograph.experimental.do_not_convert
    def step(self, linearization: Linearization | Gradients, overwriting: Tensors = ()) -> dict[str, tf.Tensor]:
        """Take one step on the batch of a `Linearization` (or `Gradients`).

        Args:
            linearization: The batch.
            overwriting: The new values of the variables that their gradients overwrite, such as float8 scales.

        Returns:
            The reported numbers, `{name: scalar}`, with `skipped_steps` 1 if the step was not taken.
        """
        self.meet(linearization.model)
        self.require(linearization.variables)
        self._noted, self._reported, self._rejected = [], {}, None
        with tf.name_scope(self.name):
            handed, finite = self._handed(linearization)
            begins = self._begins(linearization)
            handed = self._without_unreached(handed, linearization)
            length = self._reported.get("step_norm")  # of a method that has the inner products
            length = trees.norm(handed) if length is None else length
            moved = length * tf.cast(self.learning_rate, length.dtype)  # a schedule may be infinite somewhere
            finite &= tf.math.is_finite(moved) & self._no_refresh_overflowed(linearization)
            noted, rejected = list(self._noted), self._rejected

            def take():
                before = tf.identity(self.skipped_steps.value)
                _assign(noted)
                if rejected is None:
                    self._hand_to_keras(handed, overwriting)
                else:
                    tf.cond(rejected, self._count_step, lambda: self._hand_to_keras(handed, overwriting))
                # with accumulated gradients, the direction is computed in there and may be skipped in there
                return tf.cast(self.skipped_steps.value - before, tf.float32)

            def skip():
                failed = tf.logical_not(finite)  # a batch before the first gradient is passed over
                self.skipped_steps.assign_add(tf.cast(failed, self.skipped_steps.dtype))
                return tf.cast(failed, tf.float32)

            skipped = tf.cond(finite & begins, take, skip)
        stays = tf.logical_not(begins) if rejected is None else rejected | tf.logical_not(begins)
        taken = tf.where(stays, tf.zeros_like(length), length)
        self.report(step_norm=tf.where(finite, taken, float("nan")), skipped_steps=skipped)
        reported = {name: tf.cast(value, tf.float32) for name, value in self._reported.items() if name in self.logged}
        self._noted, self._reported, self._rejected = [], {}, None
        return reported

    def _no_refresh_overflowed(self, linearization):
        """Whether all refreshes succeeded, where a dynamic loss scale may be to blame if not: then it is halved."""
        scale, failed = linearization.loss_scale, self._reported.get("failed_refreshes")
        if self.needs.only_gradients or failed is None or not tf.is_tensor(scale):
            return tf.constant(True)
        return tf.equal(failed, 0) | (scale <= 1.0)

    def _begins(self, linearization):
        """Whether training has begun: not before a first batch with a gradient, which the state is made of."""
        if self._steps_each_weight or self.gradient_accumulation_steps or not _knows_gradient(linearization):
            return tf.constant(True)
        first = tf.equal(self.iterations, 0)
        return tf.cond(first, lambda: first_batch.loss_has_gradient(linearization), lambda: tf.constant(True))

    def _handed(self, linearization):
        """`(the gradient or the step, which Keras is handed; whether loss and gradient are finite)`."""
        clip, finite = super()._clip_gradients, tf.constant(True)
        if not self.needs.only_gradients:
            step = self.direction(linearization)
            handed = self._wrapped(step, lambda: linearization.gradient, clip)
            if handed is not step:  # clipping hides an infinity
                finite = trees.is_finite(step)
        elif self._preconditions and not self.gradient_accumulation_steps:
            gradient = clip(linearization.gradient)
            handed = self._wrapped(self.precondition(gradient), lambda: gradient)
        else:
            handed = linearization.gradient
        if isinstance(linearization, Linearization):
            finite &= tf.math.is_finite(linearization.loss)
            known = linearization.is_known("gradient")
        else:
            known = handed is not linearization.gradient
        return handed, finite & trees.is_finite(linearization.gradient) if known else finite

    def _without_unreached(self, handed, linearization):
        """The step, zero for weights that the loss does not depend on: they stay and do not decay, as in Keras."""
        asks = _knows_gradient(linearization) or self.weight_decay  # it may cost a gradient; a step is zero without
        reached = (linearization.reached if asks else None) or (True,) * len(handed)
        if not any(reached):
            raise ValueError("No gradients provided for any variable: the loss depends on no trainable weight.")
        self._unreached = tuple(i for i, known in enumerate(reached) if not known)
        if self._unreached and self.needs.shifted:
            warnings.warn(given.missing([self.trained[i] for i in self._unreached]), stacklevel=4)
        if not self._unreached or self.needs.shifted:  # displaced weights go back by a step
            return handed
        self._reported.pop("step_norm", None)
        return [step if known else tf.zeros_like(step) for step, known in zip(handed, reached, strict=True)]

    def _apply_weight_decay(self, variables):
        """Keras' decay, of the weights that the loss depends on."""
        left_out = {id(self.trained[i]) for i in self._unreached}
        super()._apply_weight_decay([v for v in variables if id(v) not in left_out])

    def _wrapped(self, step, gradient, clip=lambda step: step):
        """`wrapped`; without the length that the method may have reported, where the step is another one now."""
        handed = self.wrapped(step, gradient, clip)
        if handed is not step:
            self._reported.pop("step_norm", None)
        return handed

    def _clip_gradients(self, grads):
        """Keras' clipping, except for a step: it is clipped already, or made from clipped gradients."""
        return grads if self._hands_a_step else super()._clip_gradients(grads)

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        """Keras calls it once for all variables, outside the replicas; here accumulated gradients become a step."""
        each_variable = super()._distributed_tf_update_step
        if not (self._preconditions and self.gradient_accumulation_steps):
            each_variable(distribution, grads_and_vars, learning_rate)
            return
        self._noted = []
        present = {self.place_of(variable): gradient for gradient, variable in grads_and_vars}
        gradients = [present[i] if i in present else tf.zeros_like(v) for i, v in enumerate(self.trained)]
        directions = self._wrapped(self.precondition(gradients), lambda: gradients)
        directions = [directions[i] for i in present]
        noted, self._noted, self._reported = list(self._noted), [], {}  # tensors of a branch of Keras' own

        def take():
            _assign(noted)
            pairs = [(direction, variable) for direction, (_, variable) in zip(directions, grads_and_vars)]
            each_variable(distribution, pairs, learning_rate)

        tf.cond(trees.is_finite(directions), take, lambda: _nothing(self.skipped_steps.assign_add(1)))

    def _count_step(self):
        self.iterations.assign_add(1)

    def _hand_to_keras(self, gradients, overwriting):
        if self.loss_scale_factor is not None:  # Keras divides by it; the step has its true size already
            gradients = trees.scale(self.loss_scale_factor, gradients)
        if not self.needs.shifted:  # Keras warns, and skips `None`
            gradients = [None if i in self._unreached else g for i, g in enumerate(gradients)]
        self._hands_a_step = not (self._steps_each_weight or self.gradient_accumulation_steps)
        with replicas.keras_outside():
            super().apply([*gradients, *overwriting], [*self.trained, *self._overwritten])
        self._hands_a_step = False

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: list[tf.Tensor | None], trainable_variables: Variables | None = None) -> tf.Tensor:
        """Step on the gradients of each replica; what Keras calls on a plain model."""
        if trainable_variables is None and not self.built:
            raise ValueError(
                "When passing `grads` without `variables`, the optimizer must already be built on a list of variables. "
                "Call `optimizer.build(trainable_variables)` first."
            )
        variables = list(self._built_for if trainable_variables is None else trainable_variables)
        grads, variables = self._reordered(list(grads), variables)
        self.require(variables)
        reached = [g is not None for g, v in zip(grads, variables) if not overwrites(v)]
        gradients = given.complete(type(self).__name__, list(grads), variables)

        def take(gradients):
            total = replicas.add_up(gradients)
            # a variable that its gradient overwrites becomes the mean over the replicas, whatever the loss scale
            overwriting = [g / replicas.count() for g, v in zip(total, variables) if overwrites(v)]
            stepped = [g for g, v in zip(total, variables) if not overwrites(v)]
            if self.loss_scale_factor is not None:
                stepped = [g / self.loss_scale_factor for g in stepped]
            self.step(Gradients(type(self).__name__, stepped, self.trained, reached), overwriting)

        replicas.cross(take, gradients)
        return self.iterations

    def _reordered(self, grads, variables):
        """Gradients and variables in the order that the optimizer was built for, if they are the same in another."""
        if not self.built or len(grads) != len(variables):
            return grads, variables
        known, keys = (keras_internals.keys_of(self, list(some)) for some in (self._built_for, variables))
        moved = known != keys and sorted(known) == sorted(keys)
        return ([grads[keys.index(key)] for key in known], list(self._built_for)) if moved else (grads, variables)

    def meet(self, model: keras.Model | None) -> None:
        """Remember the model, if the state is built from its layers."""
        if self.needs.layers and model is not None and self.trained_model() is not model:
            self._model = weakref.ref(model)

    def trained_model(self) -> keras.Model | None:
        """The curved model that the optimizer trains, if `needs.layers`; `None` before the optimizer has seen it.

        A method, because Keras saves and loads every attribute of an optimizer, and would come back to the model.
        """
        return self._model()

    def require(self, variables: Variables) -> None:
        """Build for these variables; refuse other variables than those that the state belongs to."""
        if not variables:
            raise ValueError(f"`{type(self).__name__}`: the model has no trainable weights. Set `trainable = True`.")
        if not self.built:
            replicas.outside_of_graphs(self._build_by_name, variables)
        if not self.built:
            raise ValueError(needs_a_curved_model(type(self).__name__, "needs the model's layers"))
        trained = [v for v in variables if not overwrites(v)]
        known, wanted = (keras_internals.keys_of(self, some) for some in (self.trained, trained))
        if known != wanted:
            raise ValueError(
                f"`{type(self).__name__}` was built for {len(known)} weights "
                f"({given.names(self.trained)}) and is now given {len(wanted)} ({given.names(variables)}). Its "
                "state belongs to the first: it cannot serve another model, or this one after layers were frozen or "
                "unfrozen. Compile with a new optimizer:\n\n"
                "    model.compile(optimizer=type(optimizer).from_config(optimizer.get_config()), ...)\n"
            )

    @property
    def trained(self) -> Variables:
        """The variables that the optimizer was built for and steps, a list; without those that gradients overwrite."""
        return [v for v in self._built_for if not overwrites(v)]

    def place_of(self, variable: keras.Variable) -> int:
        """Where a variable stands in `trained`."""
        (key,) = keras_internals.keys_of(self, [variable])
        return keras_internals.keys_of(self, self.trained).index(key)

    @property
    def _built_for(self):
        return keras_internals.trained_by(self)

    @property
    def _overwritten(self):
        return [v for v in self._built_for if overwrites(v)]

    # Keras' life cycle.

    def _build_by_name(self, variables):
        with keras.name_scope(self.name, caller=self):
            self.build(variables)

    def add_variable(
        self, shape: Shape, initializer: Any = "zeros", dtype: str | tf.DType | None = None, **kwargs: Any
    ) -> keras.Variable:  # fmt: skip
        """Keras'; state is kept in float32 at least, also that of weights in half precision."""
        dtype = trees.wide(dtype or keras.config.floatx()).name if dtype != "int" else dtype
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def build(self, variables: Variables) -> None:
        """Create all state for `variables`; called by Keras. Does nothing while a needed model is unknown."""
        unknown = self.needs.layers and self.trained_model() is None
        if self.built or unknown or not variables:  # Keras builds for no variables while it loads a model from HDF5
            return
        super().build(variables)
        self.skipped_steps = self.add_variable((), dtype="int", name="skipped_steps", aggregation="none")
        self.create_state([v for v in variables if not overwrites(v)])
        self._load_waiting()


def _knows_gradient(linearization):
    return not isinstance(linearization, Linearization) or linearization.is_known("gradient")


def _assign(noted):
    for variable, value in noted:
        variable.assign(value)


def _nothing(_):
    """The value of a branch of `tf.cond` that is executed for its side effects."""
