"""One line under the progress bar where the first step of a `fit` takes long.

The first step waits until TensorFlow has traced and compiled the train step. For deep networks and methods with many
parts this takes a minute or more, in which Keras shows nothing.
"""

import contextvars
import threading

import keras
from absl import logging

SECONDS = 10.0  # until the line is shown
shows_progress = contextvars.ContextVar("shows_progress", default=False)  # whether `fit` shows a progress bar


class FirstCall:
    """A train function that says so where its first call takes longer than `SECONDS`.

    Args:
        function: The train function, a function of a data iterator.
        name: What trains, for the message.
    """

    def __init__(self, function, name):
        self._function, self._name, self._called = function, name, False

    def __call__(self, iterator):
        """The function's result."""
        if self._called or not shows_progress.get():
            return self._function(iterator)
        message = f"TensorFlow is compiling the train step of {self._name}. Only the first step waits for it."
        timer = threading.Timer(SECONDS, say, [message])
        timer.daemon = True
        timer.start()
        try:
            return self._function(iterator)
        finally:
            timer.cancel()
            self._called = True


def say(message: str) -> None:
    """Print where Keras' progress bar is shown: on the screen, or in the log without interactive logging."""
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        logging.info(message)
