"""The rest of a curved model's trainer: when it is built, how it is traced, and the logs of an epoch."""

import inspect
import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.linearization.pure.functional import build_for
from keras_curvature.training.first_call import FirstCall, shows_progress
from keras_curvature.training.reports import reported_of
from keras_curvature.training.step import CurvedStep, unwrap


class CurvedTrainer(CurvedStep):
    """A mixin with the methods of Keras' trainer that a curved model overrides."""

    _curved_batch = staticmethod(lambda: None)
    _compiled_by_class = False

    def reset_metrics(self) -> None:
        """Reset Keras' metrics and the reports."""
        super().reset_metrics()
        if "_curved_reports" in self.__dict__:
            self._curved_reports.reset()

    def make_train_function(self, force: bool = False) -> None:
        """Keras' train function. All variables are created before, so that TensorFlow traces it only once."""
        self._warn_of_the_optimizer()
        self._build_for_training()
        self._prepare_reports()
        if self.micro_batches > 1 and self.get_compile_config()["jit_compile"] == "auto":
            self.jit_compile = False  # on a GPU Keras chooses XLA, which needs slices of a known size
        super().make_train_function(force)
        if not (self.run_eagerly or isinstance(self.train_function, FirstCall)):
            trains = f"{self.name!r} by `{type(unwrap(self.optimizer)[0]).__name__}`"
            self.train_function = FirstCall(self.train_function, trains)

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Keras' `fit`; with a progress bar, one line says so where the first step takes long."""
        given = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        with keras_internals.holding(shows_progress, given.get("verbose", "auto") != 0):
            return super().fit(*args, **kwargs)

    def _warn_of_the_optimizer(self):
        """Say once which optimizer trains a model that was not compiled since it was curved, if its class chose it."""
        if self._compiled_by_class:
            self._compiled_by_class = False
            warnings.warn(
                f"`{type(self).__name__}` has a `compile` of its own and was not compiled after `curved`: it trains "
                f"with `{type(unwrap(self.optimizer)[0]).__name__}`. Keras does not restore the optimizer of such a "
                "class from a file. Compile the curved model to choose the optimizer:\n\n"
                "    model = keras_curvature.curved(model)\n"
                "    model.compile(optimizer=keras_curvature.CurveBall(), loss=...)\n",
                stacklevel=2,
            )

    def _build_for_training(self):
        """Build what is not built yet, from the shapes of the data that `fit` begins to iterate over."""
        batch, self._curved_batch = self._curved_batch, type(self)._curved_batch
        if batch() is not None:
            build_for(self, *keras.utils.unpack_x_y_sample_weight(batch()))

    # Private methods of Keras' trainer.

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Build what is not built yet, for the share of one replica.

        Keras would average the replicas' shares, which fails on several workers and for shares of different sizes. It
        would also draw a batch if everything is built, which validation on a continuing iterator would then miss.
        """
        if iterator is not None or self.train_function is None:
            self._check_scope()
        if iterator is not None and keras_internals.is_under_strategy(self):
            if keras_internals.is_built(self):
                return
            data_batch = replicas.one_of(self.distribute_strategy, next(next(iter(iterator))[-1]))
            iterator = None
        elif not keras_internals.is_built(self):  # otherwise Keras would build while it traces, and trace again
            batch = data_batch if iterator is None else keras_internals.batch_spec(iterator)
            self._curved_batch = lambda: batch  # a function, since Keras tracks lists and dictionaries
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

    def _check_scope(self):
        """Raise a `ValueError` if the model or the optimizer was not created under the current strategy."""
        strategy, optimizer = self.distribute_strategy, unwrap(self.optimizer)[0]
        made_under = keras_internals.strategy_of(optimizer)
        owners = {
            f"the model {self.name!r}": not replicas.strangers(strategy, self.variables),
            f"the optimizer `{type(optimizer).__name__}`": made_under is strategy,
        }
        for owner in (owner for owner, belongs in owners.items() if not belongs):
            raise ValueError(
                f"Training under `{type(strategy).__name__}`: {owner} was created outside the strategy's scope. "
                "Create, curve and compile the model inside:\n\n"
                "    with strategy.scope():\n"
                "        model = keras_curvature.curved(build())\n"
                "        model.compile(optimizer=keras_curvature.CurveBall(), loss=...)\n"
            )

    def _make_function(self, step_function):
        """Keras' function of a data iterator. Adds the axis over which Keras averages the logs of several workers."""

        def with_an_axis(data):
            return keras.tree.map_structure(lambda value: tf.convert_to_tensor(value)[tf.newaxis], step_function(data))

        with self.distribute_strategy.scope():
            alone = not replicas.uses_merge_calls()
        several_workers = replicas.of_several_workers(self.distribute_strategy)
        function = super()._make_function(with_an_axis if several_workers else step_function)
        return function if alone else _OneByOne(self, function)

    def _get_metrics_result_or_logs(self, logs):
        """The logs of an epoch: Keras' metrics, which it shows if its logs have no other names, and the reports."""
        reported = reported_of(self)
        found = reported.result() if reported is not None and isinstance(logs, dict) else {}
        shown = {name: number for name, number in found.items() if name in logs}
        if not shown:
            return super()._get_metrics_result_or_logs(logs)
        rest = super()._get_metrics_result_or_logs({k: v for k, v in logs.items() if k not in shown})
        if float(keras_internals.loss_tracker(self).count.numpy()) == 0.0:
            rest["loss"] = float("nan")  # every batch was skipped
        return {**rest, **shown}


class _OneByOne:
    """`steps_per_execution` steps, each a call of `function` on one batch.

    Keras loops over the steps inside a graph, in which TensorFlow cannot place the sums over replicas. Also, after the
    last batch Keras' loop would add an empty batch to the metrics before it ends.
    """

    def __init__(self, model, function):
        self._model, self._function, self._traced = model, function, {}

    def __call__(self, iterator):
        """Take the steps, and return the logs of the last one."""
        if not replicas.is_iterator(iterator):
            return self._function(iterator)
        logs = None
        for _ in range(self._model.steps_per_execution):
            batch = iterator.get_next_as_optional()
            if not batch.has_value():
                break
            logs = self._step(iterator.element_spec, batch.get_value())
        if logs is None:
            raise StopIteration
        return logs

    def _step(self, spec, batch):
        if self._model.run_eagerly:
            return self._function([batch])
        name = repr(spec)  # a nest is not hashable
        if name not in self._traced:
            # traced for batches of any length: several workers must run the same program, also if the last batch has
            # fewer examples on one worker than on another
            self._traced[name] = tf.function(
                lambda batch: self._function([batch]), input_signature=[spec], autograph=False
            )
        return self._traced[name](batch)
