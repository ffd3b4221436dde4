"""The learning rate of a run: a ramp, then stairs, a polynomial or a cosine."""

import math

import keras
import tensorflow as tf

DECAYS = ("stairs", "polynomial", "cosine")


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
        stairs = tf.pow(self.factor, tf.floor(step / self.stair_steps))
        return ramp(self, step) * stairs

    def get_config(self):
        """The arguments."""
        return {
            "start": self.start, "peak": self.peak, "ramp_steps": self.ramp_steps, "factor": self.factor,
            "stair_steps": self.stair_steps,
        }  # fmt: skip


@keras.saving.register_keras_serializable(package="keras_curvature_tpu")
class RampThenFall(keras.optimizers.schedules.LearningRateSchedule):
    """From `start` linearly to `peak` over `ramp_steps`, and from there to 0 at step `steps`.

    With `t` from 0 at the end of the ramp to 1 at the end of the run, the rate is `peak (1 - t)^power`, as with LARS
    (power 2), or `peak (1 + cos(pi t)) / 2` for `power=None`.
    """

    def __init__(self, start, peak, ramp_steps, steps, power=2.0):
        super().__init__()
        self.start, self.peak, self.ramp_steps, self.steps, self.power = start, peak, ramp_steps, steps, power

    def __call__(self, step):
        """The rate at `step`."""
        step = tf.cast(step, tf.float32)
        t = tf.clip_by_value((step - self.ramp_steps) / max(self.steps - self.ramp_steps, 1), 0.0, 1.0)
        share = 0.5 + 0.5 * tf.cos(math.pi * t) if self.power is None else tf.pow(1.0 - t, self.power)
        return ramp(self, step) * share

    def get_config(self):
        """The arguments."""
        return {
            "start": self.start, "peak": self.peak, "ramp_steps": self.ramp_steps, "steps": self.steps,
            "power": self.power,
        }  # fmt: skip


def ramp(schedule, step):
    """The rate at `step`, a float, without the decay."""
    share = tf.minimum(1.0, step / max(schedule.ramp_steps, 1)) if schedule.ramp_steps else 1.0
    return schedule.start + (schedule.peak - schedule.start) * share
