"""Curved models: Keras models with a train step for second-order optimizers."""

import abc
import functools
from typing import Any, Self

import keras

from keras_curvature import keras_internals
from keras_curvature.component import check_count, register
from keras_curvature.keras_internals import Functional
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.training.step import unwrap
from keras_curvature.training.trainer import CurvedTrainer
from keras_curvature.typing import Config, Model


class CurvedMixin(CurvedTrainer):
    """The part of a curved model besides `keras.Model`: the train step, and the optimizer's reports in the logs."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "optimizer":
            self._compiled_by_class = False
            self._introduce()

    def _introduce(self):
        """Pass the model to the optimizer: some optimizers build their state from its layers."""
        optimizer, _ = unwrap(getattr(self, "optimizer", None))
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.meet(self)

    def __reduce__(self):
        # Keras pickles the file of a model, which loads as the plain class
        _, file = super().__reduce__()
        return _unpickled, (file, self.micro_batches)


def _unpickled(file, micro_batches):
    """Unpickle a curved model; `file` are the arguments of Keras' own function."""
    return curved(keras_internals.unpickled(*file), micro_batches)


@register
class CurvatureModel(CurvedMixin, keras.Model, metaclass=abc.ABCMeta):
    """A `keras.Model` with the train step of second-order optimizers.

    Create it from inputs and outputs or by subclassing; it is saved and loaded as this class. `curved(model)` turns an
    existing model into an instance of this class.

    Attributes:
        micro_batches: Number of slices of each replica's share of a batch; see `curved`. It is also an argument of the
            constructor. `keras.models.clone_model` resets it to `1`. Defaults to `1`.

    Example:

    ```python
    inputs = keras.Input((784,))
    model = keras_curvature.CurvatureModel(inputs, keras.layers.Dense(10)(inputs))
    model.compile(optimizer=keras_curvature.CurveBall(), loss="mse")
    ```
    """

    def __init__(self, *args: Any, micro_batches: int = 1, **kwargs: Any) -> None:
        if len(args) == 2 or "outputs" in kwargs:
            # otherwise Keras would make this class itself functional, and so every later subclass
            self.__class__ = _functional_class(type(self))
            Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)
        self.micro_batches = micro_batches

    def get_config(self) -> Config:
        """Keras' config, and the number of micro-batches if it is not 1."""
        config = super().get_config()
        return config if self.micro_batches == 1 else {**config, "micro_batches": self.micro_batches}

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> Self:
        """A new model from a config."""
        config = dict(config)
        micro_batches = config.pop("micro_batches", 1)
        model = super().from_config(config, custom_objects)
        model.micro_batches = micro_batches
        return model


@functools.cache
def _functional_class(cls):
    """The subclass of `cls` for models from inputs and outputs."""
    if issubclass(cls, Functional):
        return cls
    # from the signature Keras decides whether the constructor takes a saved graph
    own = {"__init__": Functional.__init__} if cls.__init__ is CurvatureModel.__init__ else {}
    return type(cls.__name__, (cls, Functional), {"__module__": cls.__module__, "__doc__": cls.__doc__, **own})


keras.saving.register_keras_serializable(package="keras_curvature", name="FunctionalCurvatureModel")(
    _functional_class(CurvatureModel)
)


def curved(model: Model, micro_batches: int | None = None) -> Model:
    """Give `model` the train step that second-order optimizers need, in place, and return it.

    The model keeps its layers, weights and compiled state, and remains an instance of its class; it becomes an instance
    of `CurvatureModel` too. Plain Keras can load its file. After loading, curve the model again before `fit`; copies by
    `pickle` and `copy.deepcopy` are curved already. With a Keras optimizer a curved model trains as before.

    Keras does not restore the optimizer of a model whose class has its own `compile`, such as KerasHub's tasks, and
    warns about it while loading. Compile such a model again after `load_model`, or it trains with the optimizer that
    its class chooses; `fit` says so.

    Under a distribution strategy build and compile the model inside `strategy.scope()`. A batch is split among the
    replicas, and `n` replicas train as one replica does, also with Keras' own optimizers.

    Args:
        model: A `keras.Model`: functional, sequential or subclassed.
        micro_batches: Number of slices of each replica's share of a batch, which are computed one after the other, for
            batches whose activations do not fit in memory. Gradients, products and losses are summed over the slices,
            and memory holds the activations of one slice only. Methods that need only gradients take no additional
            passes; others need an additional forward pass for every product. Batch normalization uses the statistics
            of each slice. Defaults to `model.micro_batches`, or to `1` for a model that is not curved yet.

    Returns:
        The same model; `model.micro_batches` can be changed later.

    Raises:
        ValueError: `model` is not a `keras.Model`, or has its own `train_step`; `micro_batches` is not an integer of at
            least 1.

    Example:

    ```python
    model = keras_curvature.curved(keras.Sequential([...]))
    model.compile(optimizer=keras_curvature.HessianFree(), loss="sparse_categorical_crossentropy")

    model = keras_curvature.curved(model, micro_batches=64)   # a batch of 8192 in the memory for 128
    ```
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`curved`: `model` must be a `keras.Model`. Received: model={model!r}")
    check_count(curved, "micro_batches", micro_batches, or_none=True)
    if isinstance(model, CurvedMixin):
        model.micro_batches = model.micro_batches if micro_batches is None else micro_batches
        return model
    if has_own_train_step(model):
        raise ValueError(
            f"`curved`: `{type(model).__name__}` has its own `train_step`, which a curved model replaces. Compute "
            "the loss in `compute_loss(self, x, y, y_pred, sample_weight, training)` instead of `train_step`."
        )
    model.__class__ = _curved_class(type(model))  # type: ignore[arg-type]
    model.train_function = None  # traced again, with the new step
    model.micro_batches = 1 if micro_batches is None else micro_batches
    model._compiled_by_class = _is_compiled_by_class(model)
    model._introduce()
    return model


def has_own_train_step(model: keras.Model) -> bool:
    """Whether a model, curved or not, trains by a `train_step` of its class, not by Keras' or this package's."""
    return type(model).train_step not in (keras.Model.train_step, CurvedMixin.train_step)


def _is_compiled_by_class(model):
    """Whether the class, and not its user, may have chosen the optimizer, as KerasHub's tasks do in their `__init__`.

    Loaded from a file, they come back with this optimizer in place of the one that the file names.
    """
    optimizer, _ = unwrap(getattr(model, "optimizer", None))
    if optimizer is None or isinstance(optimizer, CurvatureOptimizer):
        return False
    return type(model).compile is not keras.Model.compile and int(optimizer.iterations) == 0


@functools.cache
def _curved_class(cls):
    """The subclass of `cls` with the train step, of the same name, so that a saved file names the original class."""
    made = type(cls.__name__, (CurvedMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    name = keras.saving.get_registered_name(cls)
    if keras.saving.get_registered_object(name) is cls:
        package, _, rest = name.partition(">")
        for owner in (made, cls):  # both are saved under this name, and the class registered last is loaded
            keras.saving.register_keras_serializable(package, rest)(owner)
    CurvatureModel.register(made)
    return made
