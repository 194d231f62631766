"""Streams: the values of a generator in another process, through a port of their own, at most WINDOW ahead.

who reads                                  who writes: write(), which waits; or write_in_turns()
  for value in Stream   <=== values ====     next(generator)
                        ==== so many ===>    that many more may come
                        <=== done or failed
  close()               === the close ===>   generator.close(), which runs its finally
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final, Generic, Self, TypeVar

from ._delivery import Home
from ._failure import pack_error, unpack_error
from .errors import MessageError, PortClosedError
from .events import MessageEvent
from .port import MessagePort

__all__ = ["WINDOW", "Stream"]

T = TypeVar("T")
AnyPort = MessagePort[Any, Any]

WINDOW: Final = 64
"""Values that a stream is ahead of its reader, at most."""
_VALUE, _DONE, _FAILED = "value", "done", "failed"


class Stream(Generic[T]):
    """The values of a generator in another process as they come, for ``for`` and ``async for``.

    An exception of the generator is raised behind its last value. ``close()`` stops it, and its ``finally`` runs; so
    does leaving ``with``. The generator is at most 64 values ahead of its reader.
    """

    def __init__(self, port: AnyPort) -> None:
        self._port = port
        self._taken = 0
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        try:
            kind, value = self._port.recv()
        except MessageError:  # a value that cannot be loaded here: the next may be
            self._take()
            raise
        except PortClosedError as error:
            self._over = True
            self._ended_early(error)
            raise StopIteration from None
        if self._accept(kind, value):
            return value  # type: ignore[no-any-return]
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._over:
            raise StopAsyncIteration
        try:
            kind, value = await self._port.arecv()
        except MessageError:
            self._take()
            raise
        except PortClosedError as error:
            self._over = True
            await self._aended_early(error)
            raise StopAsyncIteration from None
        if self._accept(kind, value):
            return value  # type: ignore[no-any-return]
        raise StopAsyncIteration

    def _accept(self, kind: str, value: Any) -> bool:
        """Whether *value* is one of the stream's."""
        if kind == _VALUE:
            self._take()
            return True
        self._over = True
        self._port.close()
        if kind == _FAILED:
            raise unpack_error(value)
        return False

    def _take(self) -> None:
        """A value came: now and then, tell the writer that as many more may."""
        self._taken += 1
        if self._taken >= WINDOW // 2:
            self._port.post_message(self._taken)
            self._taken = 0

    def _ended_early(self, error: PortClosedError) -> None:
        """The other side is gone without a word: raise what there is to say."""
        raise PortClosedError(f"the stream will not go on: {error}", error.reason)

    async def _aended_early(self, error: PortClosedError) -> None:
        self._ended_early(error)

    def close(self) -> None:
        """Enough: the generator is closed at its next value."""
        self._over = True
        self._port.close()

    async def aclose(self) -> None:
        """``close`` for asyncio."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name()}, {'over' if self._over else 'open'}>"

    def _name(self) -> str:
        return f"through {self._port!r}"


def write(values: Iterator[Any], port: AnyPort, stopped: Callable[[], bool]) -> Any:
    """Post *values* until *stopped* or nobody reads on; waits for the reader. Returns what the generator returns."""
    ahead = WINDOW
    try:
        while not stopped():
            try:
                value = next(values)
            except StopIteration as end:
                port.post_message((_DONE, None))
                return end.value
            if not port.post_message((_VALUE, value)):
                return None
            del value
            ahead -= 1
            while ahead <= 0:
                try:
                    ahead += port.recv()
                except PortClosedError:
                    return None
        return None
    except BaseException as error:
        port.post_message((_FAILED, pack_error(error)))
        raise
    finally:
        port.close()
        if hasattr(values, "close"):
            values.close()  # runs its finally


def write_in_turns(values: Any, port: AnyPort, at: Home) -> None:
    """Post all *values* from where listeners run, without waiting there. Those of an async iterator on that loop."""
    if hasattr(values, "__anext__"):
        at.run([_write_on_loop(values, port, at)])
    else:
        _Writer(values, port, at)


class _Writer:
    """Posts one value in each turn, so that others have theirs."""

    def __init__(self, values: Iterator[Any], port: AnyPort, at: Home) -> None:
        self._values = values
        self._port = port
        self._at = at
        self._ahead = WINDOW
        port.on("message", self._wanted)
        port.on("close", self._leave)
        port._start_at(at)
        at.call(self._step)

    def _wanted(self, event: MessageEvent[int]) -> None:
        waiting = self._ahead <= 0
        self._ahead += event.data
        if waiting:
            self._step()

    def _step(self) -> None:
        if self._port.closed:
            return
        try:
            self._port.post_message((_VALUE, next(self._values)))
        except BaseException as error:
            over = isinstance(error, StopIteration)
            self._port.post_message((_DONE, None) if over else (_FAILED, pack_error(error)))
            self._leave()
            if not isinstance(error, Exception):
                raise  # KeyboardInterrupt, SystemExit: this process is meant as well
        else:
            self._ahead -= 1
            if self._ahead > 0:
                self._at.call(self._step)

    def _leave(self, _: object = None) -> None:
        self._port._clear_listeners()  # a port that refers to us is a cycle
        self._port.close()
        if hasattr(self._values, "close"):
            self._values.close()


async def _write_on_loop(values: Any, port: AnyPort, at: Home) -> None:
    import asyncio

    task = asyncio.current_task()
    assert task is not None
    room = asyncio.Semaphore(WINDOW)

    def wanted(event: MessageEvent[int]) -> None:
        for _ in range(event.data):
            room.release()

    port.on("message", wanted)
    port.on("close", lambda _: task.cancel())
    port._start_at(at)
    try:
        while True:
            await room.acquire()
            port.post_message((_VALUE, await anext(values)))
    except StopAsyncIteration:
        port.post_message((_DONE, None))
    except asyncio.CancelledError:
        if not port.closed:
            raise
    except BaseException as error:
        port.post_message((_FAILED, pack_error(error)))
        if not isinstance(error, Exception):
            raise
    finally:
        port._clear_listeners()
        port.close()
        if hasattr(values, "aclose"):
            await values.aclose()
