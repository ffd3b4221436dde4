"""Handling of SIGTERM, which clusters send before they preempt a machine."""

import signal
import threading


class Sigterm:
    """Records the first SIGTERM while it listens; a second one goes to the previous handler.

    Attributes:
        received: Whether SIGTERM has arrived.
    """

    def __init__(self):
        self.received, self._before = False, None

    def listen(self):
        """Begin to listen: in the main thread, and if the present handler is Python's, so that it can be restored."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is not None:
            self._before = signal.signal(signal.SIGTERM, self._note)

    def stop(self):
        """Restore the previous handler, unless another one was set meanwhile."""
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def _note(self, number, frame):
        self.received = True
        self.stop()


class Terminated(SystemExit):
    """Raised when `fit` has saved and stopped on SIGTERM. If it is not caught, the process ends with the code 143."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self):
        return self.message
