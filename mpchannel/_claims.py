"""Which of the tasks that were given to a worker it has begun: tokens in a pipe, which both sides can take out.

    caller   give(numbers)    a token for each task; before the tasks themselves
    worker   claim(number)    takes the token when it begins the task; if it is gone, the task was taken back
    caller   take_back()      takes out what is left: those tasks have not begun, and never will there

The kernel gives each token to one of the two. So both agree on what has begun without asking each other, at any time:
while the worker is at work, hangs, is stopped, or is dead.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Self

from ._clone import Departure, Entry, Transferable, register
from ._kernel import Descriptors, Pipe

_TOKEN = struct.Struct("<Q")  # a divisor of the size of a page, so that a read never ends within one
MOST = 1024


class Claims(Transferable):
    """This side of the pipe. What arrives in another process can only claim."""

    __slots__ = ("_held", "_pipe")

    _code = 3
    _shared = True
    _in_ports = False

    def __init__(self, pipe: Pipe | None = None) -> None:
        self._pipe = pipe or Pipe.create()
        self._held = 0

    def give(self, numbers: Iterable[int]) -> None:
        """Numbers go up from 1, from call to call; ``MOST`` of them always fit."""
        self._pipe.put(b"".join(map(_TOKEN.pack, numbers)))

    def take_back(self) -> set[int]:
        return {number for (number,) in _TOKEN.iter_unpack(self._pipe.take(MOST * _TOKEN.size))}

    def claim(self, number: int) -> bool:
        """Whether the task may begin. To be asked for each that was given, in their order."""
        while self._held < number:  # what is lower was taken back between its token and its task
            token = self._pipe.take(_TOKEN.size)
            if not token:
                return False
            (self._held,) = _TOKEN.unpack(token)
        return self._held == number

    def close(self) -> None:
        self._pipe.close()

    # Transferable: a copy of the reading end goes with a message

    def _locks(self) -> list[tuple[int, int, Any]]:
        return []

    def _check_movable(self, name: str) -> None:
        pass

    def _pack_up(self) -> Entry:
        return Entry(self._code, b"", (self._pipe.fileno(),))

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False) -> None:
        pass

    @classmethod
    def _arrive(cls, luggage: memoryview, descriptors: Descriptors) -> Self:
        return cls(descriptors.claim_pipe())

    def _undelivered(self) -> None:
        self.close()


register(Claims)
