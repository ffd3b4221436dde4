"""What happens to training when the board fails: nothing."""

import warnings

from keras_curvature.solvers.flat import ProductNotFinite


class NotFinite(ArithmeticError):
    """The loss or its gradient is not finite on the examples measured: there is no curvature to measure now."""


class Failures:
    """Runs pieces of work, and turns their errors into warnings. A piece that failed does not run again.

    Attributes:
        dropped: Names of the pieces that failed, a set.
    """

    def __init__(self):
        self.dropped, self._told = set(), set()

    def guard(self, what, work):
        """Run `work()`; return whether it may run again. Values that are not finite may be finite the next time."""
        if what in self.dropped:
            return False
        try:
            work()
        except NotFinite as error:
            self.tell(f"{error}. Curvature is left out until they are.")
        except ProductNotFinite:
            self.tell(f"{what} is left out as long as products with the curvature overflow.")
        # Any error: hours of training are worth more than a picture of them. Ctrl-C is no `Exception`.
        except Exception as error:
            self.dropped.add(what)
            self.tell(
                f"{what} failed with {type(error).__name__}: {error}. Training goes on, and so does the rest of the "
                "board."
            )
        return what not in self.dropped

    def tell(self, sentence):
        """Warn with a sentence, once."""
        if sentence not in self._told:
            self._told.add(sentence)
            warnings.warn(f"`CurvatureBoard`: {sentence}", stacklevel=2)
