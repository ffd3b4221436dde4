"""Errors of the board: they become warnings, and training continues."""

import warnings

from keras_curvature.solvers.flat import ProductNotFinite


class NotFinite(ArithmeticError):
    """The loss or its gradient is not finite on the measured examples, so there is no curvature to measure."""


class Failures:
    """Runs pieces of work and turns their errors into warnings. A piece that failed does not run again.

    Attributes:
        dropped: Names of the pieces that failed, a set.
    """

    def __init__(self):
        self.dropped, self._told = set(), set()

    def guard(self, what, work):
        """Run `work()`; return whether it may run again. After non-finite values it may."""
        if what in self.dropped:
            return False
        try:
            work()
        except NotFinite as error:
            self.tell(f"{error}. Curvature is not measured until they are.")
        except ProductNotFinite:
            self.tell(f"{what} is not measured while products with the curvature overflow.")
        # any error, because measuring must not stop training; Ctrl-C is not an `Exception`
        except Exception as error:
            self.dropped.add(what)
            self.tell(
                f"{what} failed with {type(error).__name__}: {error}. Training and the rest of the board "
                "continue without it."
            )
        return what not in self.dropped

    def tell(self, sentence):
        """Warn with a sentence, once for each sentence."""
        if sentence not in self._told:
            self._told.add(sentence)
            warnings.warn(f"`CurvatureBoard`: {sentence}", stacklevel=2)
