"""How a run is stopped: by Ctrl-C or SIGTERM at a step boundary, or by the loss of one of its processes."""

import signal
import sys
import threading
from typing import Any, Self


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM: the run stopped at a step boundary and left a checkpoint."""


class ProcessLost(RuntimeError):
    """Another process of this run is gone, or hangs."""


class Stop:
    """While its block runs, Ctrl-C and SIGTERM are noted here.

    signal: the one that this process got, 0 for none. is_due: the run stops after this step, for that signal or for
    one that another of its processes got.

    Launchers send a signal to all processes, one after the other. A process that ends because of another one has its
    own signal still to come: it changes nothing, so that the process can save, and say how it ended.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.is_due = False
        self._previous: dict[int, Any] = {}

    def note(self, number: int, frame: Any) -> None:
        """First Ctrl-C or SIGTERM: finish the step, save, stop. Second: stop at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if not self.is_due:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def take_sigterm(self) -> None:
        """Lightning puts a SIGTERM handler before this one that ends the run with exit code 0 and no word."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.note)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: the caller keeps its own handling
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if not self.signal and (self.is_due or kind is ProcessLost):
            for number in self._previous:
                signal.signal(number, self._restore)
        else:
            self._restore()

    def _restore(self, *_signal: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
