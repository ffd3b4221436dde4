"""Every private name of Keras and TensorFlow that the package uses.

A name is private if it begins with an underscore or is imported from below `keras.src`, `tensorflow.python` or
`tf.__internal__`. The rest of the package calls the functions below. `tests/test_keras_internals.py` tests each of
them, and `tests/test_private_names.py` fails if another file uses a private name. The names are those of Keras 3.10 to
3.15 and TensorFlow 2.19 to 2.21.

| private name | function | why not a public name |
| --- | --- | --- |
| **models.py** |  |  |
| `Layer._flatten_layers` | `layers_of` | `model.layers` has the outermost layers only |
| `Layer._trainable_variables` | `own_weights` | `trainable_variables` includes those of sublayers |
| `Sequential._functional` | `functional_of` | a `Sequential` is no functional model itself |
| `KerasTensor._keras_history`, `Operation._inbound_nodes` | `made_by` | no public name for who made a tensor |
| `Trainer._call_has_training_arg` | `takes_training` | Keras' own train step uses it |
| `Trainer._compute_loss` | `compute_loss` | `compute_loss` may lack the argument `training` |
| `Trainer._compile_loss`, `_compile_metrics` | `is_built` | no public name |
| `Trainer._symbolic_build` | `build` | builds the optimizer, metrics and losses at once |
| `Trainer._compile_config` | `compiled_with` | `get_compile_config` has no functions and objects |
| `Trainer._distribute_strategy` | `is_under_strategy` | without a strategy, `distribute_strategy` is the default |
| `Trainer._initial_epoch` | `begin_at_epoch` | `BackupAndRestore` uses it too |
| `KerasSaveable._unpickle_model` | `unpickled` | `load_model` does not take an open file |
| `SafeModeScope` | `trusting` | the public switch has no way back |
| `Functional` | `Functional` | the class behind `keras.Model(inputs, outputs)` |
| (public: `keras.Model.metrics`) | `loss_tracker` |  |
| **losses.py** |  |  |
| `CompileLoss._flat_losses` | `losses_of` | `model.loss` is as the user wrote it |
| `CompileLoss._flat_losses` | `changed_losses` | replaces losses inside the compiled loss |
| `LossFunctionWrapper` | `function_of` | the class is not exported |
| `LossFunctionWrapper._fn_kwargs` | `options_of` | `get_config` of a sparse loss leaves out `axis` |
| `loss.apply_mask` | `with_mask` | what a mean over weights is divided by |
| `Tensor._keras_logits`, `_keras_mask` | `carried`, `carry`, `logits_of`, `LOGITS` | Keras sets these attributes |
| **layers.py** |  |  |
| `BatchNormalization._moments` | `batch_moments` | `keras.ops.moments` takes no mask |
| `keras.src.layers`, its folders | `folder_of` | which classes are Keras' own, and of what kind |
| **optimizers.py** |  |  |
| `Optimizer._trainable_variables` | `trained_by` | `variables` is the optimizer's state |
| `Optimizer._var_key` | `keys_of` | variables mirrored on replicas need a common key |
| `Optimizer._get_variable_index` | `places_of` | the index of a variable's state |
| `Adam._velocities`, ... | `state` | `variables` does not say which is which |
| `Optimizer._use_weight_decay` | `decays` | what `exclude_from_weight_decay` names |
| `TFOptimizer._distribution_strategy` | `strategy_of` | a wrong strategy would fail only at the first step |
| **epochs.py** |  |  |
| `TFEpochIterator._distributed_dataset` | `batch_spec` | callbacks do not get the data |
| `PerReplicaSpec._value_specs` | `batch_spec` | the spec of one replica |
| `TFEpochIterator._enumerate_iterator` | `changed_steps`, `last_step` | Keras 3.10 has no last steps |
| **tensorflow.py** |  |  |
| `tensor_util.constant_value_as_shape` | `static_shape` | `get_static_value` fails for partly known shapes |
| `op_def_registry.get` | `is_continuous` | the dtypes that an operation takes and returns |
| `control_flow_util.GraphOrParentsInXlaContext` | `is_compiled` | slices of unknown size fail under XLA |
| `strategy_supports_no_merge_call` | `uses_merge_calls` | how replicas synchronize |
| `extended._in_multi_worker_mode` | `has_several_workers` | the class also runs with one worker |

`versions.py` says what differs between the versions of Keras: `KERAS`, `HAS_LAST_STEPS`, `ACTIVITY_IS_A_MEAN`,
`MULTI_OPTIMIZER`.

Private methods of Keras that the package overrides:

| private name | overridden in | because |
| --- | --- | --- |
| `Trainer._maybe_symbolic_build` | `training` | Keras averages slices and draws a batch |
| `Trainer._make_function` | `training` | logs of several workers; several steps per execution |
| `Trainer._get_metrics_result_or_logs` | `training` | adds reports to the logs of an epoch |
| `Optimizer._clip_gradients` | `optimizers/lifecycle.py` | clips what is asked for, once |
| `Optimizer._apply_weight_decay` | `optimizers/wrappers.py` | a cautious decay is in the step |
| `TFOptimizer._distributed_tf_update_step` | `optimizers` | updates all variables at once, outside the replicas |
| `Optimizer._update_model_variables_moving_average` | `optimizers` | averages in float32 |
| `TFOptimizer._overwrite_model_variables_with_average_value` | `optimizers` | rounds averages to half precision |

`replaced.py` lists the functions that the package replaces. `guards.py` has `guard`, `guard_attribute`, `holding` and
`twin`, which replace them.
"""

from keras_curvature.keras_internals.epochs import (
    FIT,
    NEW_ITERATOR,
    STEPS_OF_EPOCH,
    batch_spec,
    changed_steps,
    last_step,
)  # fmt: skip
from keras_curvature.keras_internals.guards import guard, guard_attribute, holding, twin
from keras_curvature.keras_internals.layers import batch_moments, folder_of
from keras_curvature.keras_internals.losses import (
    LOGITS,
    carried,
    carry,
    changed_losses,
    function_of,
    logits_of,
    losses_of,
    options_of,
    with_mask,
)  # fmt: skip
from keras_curvature.keras_internals.models import (
    Functional,
    begin_at_epoch,
    build,
    compiled_with,
    compute_loss,
    functional_of,
    is_built,
    is_under_strategy,
    layers_of,
    loss_tracker,
    made_by,
    own_weights,
    takes_training,
    trusting,
    unpickled,
)  # fmt: skip
from keras_curvature.keras_internals.optimizers import decays, keys_of, places_of, state, strategy_of, trained_by
from keras_curvature.keras_internals.tensorflow import (
    has_several_workers,
    is_compiled,
    is_continuous,
    static_shape,
    uses_merge_calls,
)  # fmt: skip
from keras_curvature.keras_internals.versions import ACTIVITY_IS_A_MEAN, HAS_LAST_STEPS, KERAS, MULTI_OPTIMIZER

__all__ = [
    "ACTIVITY_IS_A_MEAN", "FIT", "HAS_LAST_STEPS", "KERAS", "LOGITS", "MULTI_OPTIMIZER", "NEW_ITERATOR",
    "STEPS_OF_EPOCH", "Functional", "batch_moments", "batch_spec", "begin_at_epoch", "build", "carried", "carry",
    "changed_losses", "changed_steps", "compiled_with", "compute_loss", "decays", "folder_of", "function_of",
    "functional_of", "guard", "guard_attribute", "has_several_workers", "holding", "is_built", "is_compiled",
    "is_continuous", "is_under_strategy", "keys_of", "last_step", "layers_of", "logits_of", "loss_tracker", "losses_of",
    "made_by", "options_of", "own_weights", "places_of", "state", "static_shape", "strategy_of", "takes_training",
    "trained_by", "trusting", "twin", "unpickled", "uses_merge_calls", "with_mask",
]  # fmt: skip
