"""The bridge to Keras: a train step that linearizes the batch and hands it to the optimizer. No mathematics."""

import functools

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check_count, register
from keras_curvature.keras_internals import Functional
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure.functional import build_for
from keras_curvature.optimizers.base import CurvatureOptimizer


class Report(keras.metrics.Metric):
    """One reported number in the logs: the mean, the last or the sum of an epoch's finite values.

    NaN where an epoch had none. A real metric, because Keras shows an epoch's metrics and, beside them, of anything
    else in the logs only the last batch.
    """

    def __init__(self, name, how):
        super().__init__(name=name)
        self.how = how
        self.total = self.add_weight(name="total", initializer="zeros", dtype="float32")
        self.count = self.add_weight(name="count", initializer="zeros", dtype="float32")

    def update_state(self, value):
        """Take in the number of one step."""
        finite = tf.math.is_finite(value)
        # every replica reports the same number, and Keras adds up what they hold
        share = 1.0 / replicas.count()
        value, one = tf.where(finite, value * share, 0.0), tf.where(finite, share, 0.0)
        if self.how == "last":
            self.total.assign(tf.where(finite, value, self.total.value))
            self.count.assign(tf.maximum(self.count.value, one))
        else:
            self.total.assign_add(value)
            self.count.assign_add(one)

    def result(self):
        """The epoch's number so far."""
        # read on a replica, a variable shows that replica's share
        whole = self.total.value / self.count.value if self.how == "mean" else self.total.value * replicas.here()
        return tf.where(self.count.value > 0, whole, float("nan"))


class CurvedMixin:
    """What a curved model adds to a `keras.Model`: the train step, and the optimizer's reports in the logs."""

    @property
    def micro_batches(self):
        """Number of slices that each replica's share of a batch is computed in, one after the other."""
        return self.__dict__.get("_curved_micro_batches", 1)

    @micro_batches.setter
    def micro_batches(self, value):
        check_count(self, "micro_batches", value)
        if value == self.micro_batches:
            return
        object.__setattr__(self, "_curved_micro_batches", value)
        if self.train_function is not None:  # traced again, with the new number; also where `fit` is running
            self.make_train_function(force=True)

    @property
    def optimizer(self):
        """The compiled optimizer, which has met the model: it may be built by its layers."""
        if "optimizer" not in self.__dict__:
            raise AttributeError(f"The model {self.name!r} is not compiled: it has no optimizer.")
        return self.__dict__["optimizer"]

    @optimizer.setter
    def optimizer(self, optimizer):
        self.__dict__["optimizer"] = optimizer
        self._introduce()

    def _introduce(self):
        optimizer, _ = unwrap(self.__dict__.get("optimizer"))
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.meet(self)

    def train_step(self, data):
        """Linearize the batch, step, commit batch statistics once; Keras' own step where that does as well."""
        if not self._steps_by_linearization():
            return super().train_step(data)
        optimizer, _ = unwrap(self.optimizer)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        loss, outputs, taken, reported = replicas.cross(self._curved_step, x, y, sample_weight)
        first = next(a for a in keras.tree.flatten(x) if a is not None)
        # a batch that was skipped does not count: one NaN would be the loss of the whole epoch
        keras_internals.loss_tracker(self).update_state(
            tf.where(taken, loss, tf.zeros_like(loss)), sample_weight=tf.where(taken, tf.shape(first)[0], 0)
        )
        logs = dict(self.compute_metrics(x, y, outputs, sample_weight=sample_weight))
        if "loss" in logs:  # where no batch has counted yet, the mean of none is not 0
            logs["loss"] = tf.where(keras_internals.loss_tracker(self).count.value > 0, logs["loss"], float("nan"))
        for name, report in (self._reports(optimizer) if reported else {}).items():
            report.update_state(reported.get(name, tf.constant(float("nan"))))
            logs[name] = report.result()
        return logs

    def _steps_by_linearization(self):
        """Whether Keras' own train step does not do.

        For Keras' own optimizers it does on one replica and on a TPU. Where a strategy synchronizes by merge calls it
        refuses accumulated gradients, averages that overwrite the weights, and several steps per execution; ours
        leaves the replicas once, for the whole step, and takes Keras' optimizers along.
        """
        ours = isinstance(unwrap(self.optimizer)[0], CurvatureOptimizer)
        return ours or self.micro_batches > 1 or replicas.uses_merge_calls()

    def _curved_step(self, x, y, sample_weight):
        """`(loss, outputs, whether the step was taken, reported)`, outside the replicas."""
        optimizer, scaler = unwrap(self.optimizer)
        build_for(self, x, y, sample_weight)
        ours = isinstance(optimizer, CurvatureOptimizer)
        needs = optimizer.needs if ours else Needs(only_gradients=True)
        if ours:
            optimizer.require(self.trainable_variables)
            self._reports(optimizer)  # created here, if nobody has yet: inside the replicas it cannot be done
        lin = Linearization(
            self, x, y, sample_weight, micro_batches=self.micro_batches,
            needs=needs, shift=optimizer.shift() if needs.shifted else None,
            loss_scale=optimizer.loss_scale_factor if scaler is None else tf.identity(scaler.dynamic_scale.value),
        )  # fmt: skip
        if ours:
            reported = optimizer.step(lin)
            taken = reported["skipped_steps"] == 0.0
        else:
            reported, taken = {}, _step_of_keras(optimizer, lin, checked=scaler is not None)
        tf.cond(taken, lambda: _nothing(lin.commit()), lambda: _nothing(None))
        if scaler is not None:
            _update_loss_scale(scaler, taken)
        return lin.loss, lin.outputs, taken, reported

    def _reports(self, optimizer):
        """`{name: Report}` of the compiled optimizer; made anew where it is another one."""
        kept = self.__dict__.get("_curved_reports")
        if kept is None or kept[0] is not optimizer:
            with tf.init_scope(), self.distribute_strategy.scope():
                reports = {"skipped_steps": "sum", **optimizer.reports}
                made = {name: Report(name, how) for name, how in reports.items()}
            kept = (optimizer, made)
            # past Keras' attribute tracking, which would count the reports among the metrics of `evaluate`
            object.__setattr__(self, "_curved_reports", kept)
        return kept[1]

    def reset_metrics(self):
        """Keras' metrics and the reports begin again."""
        super().reset_metrics()
        for report in (self.__dict__.get("_curved_reports") or (None, {}))[1].values():
            report.reset_state()

    def make_train_function(self, force=False):
        """Keras' train function; the reports are created before it is traced."""
        optimizer, _ = unwrap(self.optimizer)
        if isinstance(optimizer, CurvatureOptimizer):
            self._reports(optimizer)
        if self.micro_batches > 1 and self.get_compile_config()["jit_compile"] == "auto":
            self.jit_compile = False  # on a GPU Keras chooses XLA, for which slices must be of a size that is known
        return super().make_train_function(force)

    # Two private names of Keras' trainer, where `fit` begins and where a step's logs leave the replicas.

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Build what waits for a first batch, from the slice of one replica.

        Keras would average the slices: on several workers, or where they are uneven, it cannot. And it would draw a
        batch where nothing waits, which a validation that goes on in its data would miss.
        """
        if iterator is not None or self.train_function is None:
            self._check_scope()
        if iterator is not None and keras_internals.is_under_strategy(self):
            if keras_internals.is_built(self):
                return
            data_batch = replicas.one_of(self.distribute_strategy, next(next(iter(iterator))[-1]))
            iterator = None
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

    def _check_scope(self):
        """Refuse a model or an optimizer that belongs to another strategy than the one that trains."""
        strategy, optimizer = self.distribute_strategy, unwrap(self.optimizer)[0]
        made_under = keras_internals.strategy_of(optimizer)
        owners = {
            f"the model {self.name!r}": not replicas.strangers(strategy, self.variables),
            f"the optimizer `{type(optimizer).__name__}`": made_under is strategy,
        }
        for owner in (owner for owner, belongs in owners.items() if not belongs):
            raise ValueError(
                f"Training under `{type(strategy).__name__}`: {owner} was made outside the strategy's scope. Make the "
                "model, curve it and compile it inside:\n\n"
                "    with strategy.scope():\n"
                "        model = keras_curvature.curved(build())\n"
                "        model.compile(optimizer=keras_curvature.CurveBall(), loss=...)\n"
            )

    def _make_function(self, step_function):
        """Keras averages the logs of several workers over an axis that scalars do not have; they get one."""

        def with_an_axis(data):
            return keras.tree.map_structure(lambda value: tf.convert_to_tensor(value)[tf.newaxis], step_function(data))

        with self.distribute_strategy.scope():
            alone = not replicas.uses_merge_calls()
        several_workers = replicas.of_several_workers(self.distribute_strategy)
        function = super()._make_function(with_an_axis if several_workers else step_function)
        return function if alone else self._one_by_one(function)

    def _one_by_one(self, function):
        """`steps_per_execution` steps, each a call of `function` on one batch.

        Keras' loop over the steps stands in a graph, where TensorFlow fails to place the sums over replicas; and a
        step that asks for a batch after the last one adds an empty batch to the metrics before it fails.
        """

        traced = {}

        def step(iterator, batch):
            if self.run_eagerly:
                return function([batch])
            spec = iterator.element_spec
            name = repr(spec)  # a nest, which has no hash
            if name not in traced:
                # for batches of any length that the data may have: several workers must run the same program, also
                # where the last batch leaves one of them with fewer examples than another
                traced[name] = tf.function(lambda batch: function([batch]), input_signature=[spec], autograph=False)
            return traced[name](batch)

        def several(iterator):
            if not replicas.is_iterator(iterator):
                return function(iterator)
            logs = None
            for _ in range(self.steps_per_execution):
                batch = iterator.get_next_as_optional()
                if not batch.has_value():
                    break
                logs = step(iterator, batch.get_value())
            if logs is None:
                raise StopIteration
            return logs

        return several

    def _get_metrics_result_or_logs(self, logs):
        # a private name of Keras 3.15: the logs of an epoch, from the metrics where the names agree
        reports = (self.__dict__.get("_curved_reports") or (None, {}))[1]
        shown = {name: report.result() for name, report in reports.items() if isinstance(logs, dict) and name in logs}
        if not shown:
            return super()._get_metrics_result_or_logs(logs)
        rest = super()._get_metrics_result_or_logs({k: v for k, v in logs.items() if k not in shown})
        if float(keras_internals.loss_tracker(self).count.numpy()) == 0.0:
            rest["loss"] = float("nan")  # every batch was skipped
        return {**rest, **shown}


@register
class CurvatureModel(CurvedMixin, keras.Model):
    """A `keras.Model` born curved: everything a `keras.Model` is, with the train step of second-order optimizers.

    Made from inputs and outputs or by subclassing, saved and loaded as itself. A model that exists already is
    curved by `curved(model)`.

    Attributes:
        micro_batches: Number of slices that each replica's share of a batch is computed in; see `curved`. An argument
            of the constructor too. `keras.models.clone_model` begins with `1` again. Defaults to `1`.

    Example:

    ```python
    inputs = keras.Input((784,))
    model = keras_curvature.CurvatureModel(inputs, keras.layers.Dense(10)(inputs))
    model.compile(optimizer=keras_curvature.CurveBall(), loss="mse")
    ```
    """

    def __init__(self, *args, micro_batches=1, **kwargs):
        if len(args) == 2 or "outputs" in kwargs:
            # left to itself, Keras would make this very class functional, and so every later subclass of it
            object.__setattr__(self, "__class__", _functional_class(type(self)))
            Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)
        self.micro_batches = micro_batches

    def get_config(self):
        """Keras' config, and the number of micro-batches where it is not 1."""
        config = super().get_config()
        return config if self.micro_batches == 1 else {**config, "micro_batches": self.micro_batches}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The model that `get_config` described."""
        config = dict(config)
        micro_batches = config.pop("micro_batches", 1)
        model = super().from_config(config, custom_objects)
        model.micro_batches = micro_batches
        return model


@functools.cache
def _functional_class(cls):
    """`cls` made from inputs and outputs."""
    if issubclass(cls, Functional):
        return cls
    # Keras looks at the signature to know that a saved graph can be given back to the constructor
    own = {"__init__": Functional.__init__} if cls.__init__ is CurvatureModel.__init__ else {}
    return type(cls.__name__, (cls, Functional), {"__module__": cls.__module__, "__doc__": cls.__doc__, **own})


keras.saving.register_keras_serializable(package="keras_curvature", name="FunctionalCurvatureModel")(
    _functional_class(CurvatureModel)
)


def curved(model, micro_batches=None):
    """Give `model` the train step that second-order optimizers need, in place, and return it.

    The model stays what it is: the same layers, weights and compiled state, an instance of its class, saved to a file
    that plain Keras loads. After loading, curve it again before `fit`. Under a Keras optimizer a curved model trains as
    before.

    Under a distribution strategy build and compile the model inside `strategy.scope()`; a batch is shared out among
    the replicas, and `n` of them train as one does. This holds for Keras' own optimizers too.

    Args:
        model: A `keras.Model`: functional, sequential or subclassed.
        micro_batches: Number of slices that each replica's share of a batch is computed in, one after the other, for
            batches larger than memory: gradients, products and losses are sums over the slices, and no more
            activations are kept than one slice has. Costs no more passes where gradients suffice, and a forward pass
            for every product. Batch normalization takes the statistics of each slice. Defaults to what the model has
            already, else `1`.

    Returns:
        The same object; `model.micro_batches` can be set again.

    Raises:
        ValueError: `model` is not a `keras.Model`, or has a `train_step` of its own; `micro_batches` is not an
            integer of at least 1.

    Example:

    ```python
    model = keras_curvature.curved(keras.Sequential([...]))
    model.compile(optimizer=keras_curvature.HessianFree(), loss="sparse_categorical_crossentropy")

    model = keras_curvature.curved(model, micro_batches=64)   # a batch of 8192 in the memory of one of 128
    ```
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`curved`: `model` must be a `keras.Model`. Received: model={model!r}")
    if micro_batches is not None:
        check_count(curved, "micro_batches", micro_batches)
    if isinstance(model, CurvedMixin):
        model.micro_batches = model.micro_batches if micro_batches is None else micro_batches
        return model
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"`curved`: `{type(model).__name__}` has a `train_step` of its own, and a curved model brings another. Put "
            "the loss into `compute_loss(self, x, y, y_pred, sample_weight, training)` instead of `train_step`."
        )
    # object's own setter: Keras' would take the class for an attribute to track
    object.__setattr__(model, "__class__", _curved_class(type(model)))
    model.train_function = None  # traced again, with the new step
    model.micro_batches = 1 if micro_batches is None else micro_batches
    model._introduce()
    return model


@functools.cache
def _curved_class(cls):
    """`cls` with the train step, under the same name, so that a saved file names the class that Keras knows."""
    return type(cls.__name__, (CurvedMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def unwrap(optimizer):
    """`(optimizer, scaler)`: the optimizer itself and the `LossScaleOptimizer` of `mixed_float16` around it."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer, optimizer
    return optimizer, None


def _step_of_keras(optimizer, lin, checked):
    """One step of an optimizer of Keras' own, outside the replicas; whether it was taken.

    As Keras does, it is passed over where the gradient is not finite under a loss scale, and only there.
    """
    gradient, scale = lin.gradient, optimizer.loss_scale_factor
    handed = gradient if scale is None else trees.scale(scale, gradient)
    handed = [g if reached else None for g, reached in zip(handed, lin.reached)]  # Keras passes these over

    def take():
        with replicas.keras_outside():
            optimizer.apply(handed, lin.variables)
        return tf.constant(True)

    return tf.cond(trees.is_finite(gradient), take, lambda: tf.constant(False)) if checked else take()


def _update_loss_scale(scaler, finite):
    """Dynamic loss scaling, by Keras' rule: half after a step that was not finite, double after enough others."""
    due = scaler.step_counter.value >= scaler.dynamic_growth_steps - 1
    scale, counter = scaler.dynamic_scale.value, scaler.step_counter.value
    factor = tf.where(finite, tf.where(due, 2.0, 1.0), 0.5)
    scaler.dynamic_scale.assign(scale * factor)
    scaler.step_counter.assign(tf.where(finite & tf.logical_not(due), counter + 1, tf.zeros_like(counter)))


def _nothing(_):
    """The value of a branch that is there for its effects."""
    return tf.constant(0)
