"""The moving averages of the weights, for `use_ema=True`."""

import keras
import tensorflow as tf

from keras_curvature import keras_internals, trees


class AveragedWeights(keras.optimizers.Optimizer):
    """Keras' averages, computed and kept in float32 for weights in half precision too."""

    def _update_model_variables_moving_average(self, trainable_variables):
        if self.use_ema:
            momentum = tf.where(tf.equal(self.iterations, 0), 0.0, self.ema_momentum)
            averages = keras_internals.state(self, "model_variables_moving_average")
            for variable, average in zip(trainable_variables, averages):
                if average is not None:  # of a variable that its gradient overwrites
                    m = tf.cast(momentum, average.dtype)
                    average.assign(m * average + (1.0 - m) * tf.cast(variable, average.dtype))

    def _overwrite_model_variables_with_average_value(self, trainable_variables):
        if all(trees.wide(v.dtype) == v.dtype for v in trainable_variables):
            super()._overwrite_model_variables_with_average_value(trainable_variables)
            return
        update = keras_internals.strategy_of(self).extended.update
        averages = keras_internals.state(self, "model_variables_moving_average")
        for variable, average in zip(trainable_variables, averages):
            if average is not None:
                update(variable.value, lambda v, a: v.assign(tf.cast(a, v.dtype)), args=(average.value,))
