"""Child processes that never outlive the demo, and that leave Ctrl-C to the main process."""

from __future__ import annotations

import signal
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self


class Children:
    """``with Children() as children: children.start(process)``. On leaving, each process has ended: by itself, or,
    when leaving with an exception such as ``KeyboardInterrupt``, by ``terminate()``.
    """

    def __init__(self) -> None:
        self._started: list[BaseProcess] = []

    def start(self, process: BaseProcess) -> None:
        # Ctrl-C reaches every process of the terminal at once. What is ignored at its start is ignored in a child from
        # its very first instruction, so that only the main process hears of it, and says it once.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
            self._started.append(process)
        finally:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self._started:
            if error is not None:
                process.terminate()
        for process in self._started:
            process.join()
