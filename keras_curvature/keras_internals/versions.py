"""What differs between the versions of Keras that the package works with."""

import keras

KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])

# `fit` yields the last step of an execution, and `on_train_batch_end` gets it; before, only the first one
HAS_LAST_STEPS = KERAS >= (3, 11)
# an activity regularizer is divided by the number of examples; before, it is a sum over the batch
ACTIVITY_IS_A_MEAN = KERAS >= (3, 14)
# `()` where there is none: nothing is an instance of it
MULTI_OPTIMIZER = getattr(keras.optimizers, "MultiOptimizer", ())
