"""SIGTERM, which a cluster sends before it takes a machine away."""

import signal
import threading


class Sigterm:
    """Notes the first SIGTERM while it listens; a second one goes to the handler that was there before.

    Attributes:
        received: Whether SIGTERM has come.
    """

    def __init__(self):
        self.received, self._before = False, None

    def listen(self):
        """Listen from now on. Only the main thread can; and a handler that is not Python's could not be restored."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is not None:
            self._before = signal.signal(signal.SIGTERM, self._note)

    def stop(self):
        """Restore the handler from before, unless somebody else has set another one meanwhile."""
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def _note(self, number, frame):
        self.received = True
        self.stop()


class Terminated(SystemExit):
    """`fit` ended on SIGTERM, after saving. If nobody catches it, the process ends with the code of SIGTERM, 143."""

    def __init__(self, message):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self):
        return self.message
