"""LARS: momentum SGD whose step of each layer has a length in proportion to the layer's weights."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="keras_curvature_tpu")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling.

        v <- momentum v + eta rate (g + d w),   rate = trust |w| / (|g| + d |w| + epsilon),   w <- w - v

    Reference: You, Gitman and Ginsburg, "Large batch training of convolutional networks" (2017), Algorithm 1. As in the
    TPU models of TensorFlow, weights that are excluded by name (biases, normalization) have `rate = 1` and `d = 0`.

    Args:
        learning_rate: `eta`, a float or schedule.
        momentum: Defaults to `0.9`.
        decay: `d`, weight decay as part of the gradient. Defaults to `1e-4`.
        trust: Defaults to `1e-3`.
        epsilon: Defaults to `1e-9`; a layer of zeros has `rate = 1`, as one whose gradient is zero.
        excluded: Parts of the names of the weights without `rate` and decay.
        **kwargs: Keras'.
    """

    def __init__(
        self, learning_rate=1.0, momentum=0.9, decay=1e-4, trust=1e-3, epsilon=1e-9, excluded=("bias", "gamma", "beta"),
        name="lars", **kwargs,
    ):  # fmt: skip
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum, self.decay, self.trust, self.epsilon = momentum, decay, trust, epsilon
        self.excluded = list(excluded)

    def build(self, variables):
        """Create the velocities."""
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step."""
        eta, g = tf.cast(learning_rate, variable.dtype), tf.cast(gradient, variable.dtype)
        w = tf.convert_to_tensor(variable)
        if not any(part in variable.name for part in self.excluded):
            length, slope = tf.norm(w), tf.norm(g)
            rate = self.trust * length / (slope + self.decay * length + self.epsilon)
            g = tf.where((length > 0) & (slope > 0), rate, 1.0) * (g + self.decay * w)
        velocity = self.velocities[self._get_variable_index(variable)]
        velocity.assign(self.momentum * velocity + eta * g)
        variable.assign_sub(velocity)

    def get_config(self):
        """The arguments."""
        own = ("momentum", "decay", "trust", "epsilon", "excluded")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}
