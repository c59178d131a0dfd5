"""Ctrl-C and SIGTERM: the first asks to stop after the current step, the second ends the process at once."""

import contextlib
import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from gensparse.errors import Cancelled

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupts:
    """While active, `cancel` is set by the first signal and a second one exits.

    A thread sees the signals through the wake-up socket, so that the second one works even while the main thread is
    inside a long tensor operation. Until `deferred` is true the first signal raises Cancelled at once: nothing is
    worth finishing yet.
    """

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.code = 0
        self.deferred = False
        self._before: dict[int, Any] = {}
        self._old_fd = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, self._in_main) for number in _CODES}
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()

    def _watch(self) -> None:
        asked = False
        with self._reader:
            while data := self._reader.recv(1):
                code = next((code for number, code in _CODES.items() if number == data[0]), 0)
                if not code:
                    continue
                if asked:
                    os._exit(code)
                asked, self.code = True, code
                self.cancel.set()
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    def _in_main(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or _CODES[signal.Signals(number)]
        self.cancel.set()
        if not self.deferred:
            raise Cancelled("stopped on request")
