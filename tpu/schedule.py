"""The learning rate of a run: a ramp, then stairs."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="keras_curvature_tpu")
class RampThenStairs(keras.optimizers.schedules.LearningRateSchedule):
    """From `start` linearly to `peak` over `ramp_steps`, and times `factor` after every `stair_steps`, from step 0 on.

    The paper's: over five epochs to a rate linear in the batch size (Goyal et al., 2017), then x0.3 every 40 epochs,
    and for the baselines x0.94 every 2.
    """

    def __init__(self, start, peak, ramp_steps, factor, stair_steps):
        super().__init__()
        self.start, self.peak, self.ramp_steps = start, peak, ramp_steps
        self.factor, self.stair_steps = factor, stair_steps

    def __call__(self, step):
        """The rate at `step`."""
        step = tf.cast(step, tf.float32)
        ramp = tf.minimum(1.0, step / max(self.ramp_steps, 1)) if self.ramp_steps else 1.0
        stairs = tf.pow(self.factor, tf.floor(step / self.stair_steps))
        return (self.start + (self.peak - self.start) * ramp) * stairs

    def get_config(self):
        """The arguments."""
        return {
            "start": self.start, "peak": self.peak, "ramp_steps": self.ramp_steps, "factor": self.factor,
            "stair_steps": self.stair_steps,
        }  # fmt: skip
